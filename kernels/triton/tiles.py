"""Tiles of the kernels: the candidates for whatever a tile depends on; the first of each runs.

The order is that of `python bench/tune_kernels.py OUT.json`, which times all candidates at 8 experts on a GPU and
prints their lines anew. NOT YET TIMED: until then first comes what compiles best, without a spilled register on any
architecture and with many bytes in flight (at 8 experts 24 KiB and more per multiprocessor of an H100, where 14 KiB
hide 600 ns at 3 TB/s). tests/kernels compiles every tile that runs for every architecture, and all others for one.
Nothing is tuned at run time: a kernel is compiled once, and no result depends on a stopwatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

_MIN_DOT = 16  # smallest side of a matrix product on tensor cores
_INTERPRETED = 132  # multiprocessors of an H100, in Triton's interpreter and where kernels are compiled without a GPU


class Key(NamedTuple):
    """What a tile depends on; the defaults stand for what it does not depend on.

    Attributes:
        kernel: its name, without `_kernel`.
        experts: number that a tile has room for, a power of two.
        precision: "half" or "float", of the states or of the gradient.
        size: "few" or "many" items.
    """

    kernel: str
    experts: int = 0
    precision: str = ""
    size: str = ""


class Tile(NamedTuple):
    """Rows and columns per step of a program, and how it runs.

    Rows are items, slabs or partial sums, columns numbers of each; a stream of numbers has columns alone. In
    `route_users`, which has a program per user, rows are items and columns the partial sums of the batch.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 3

    def options(self, rows: str = "", columns: str = "") -> dict[str, int]:
        """Options of a launch; rows and columns under the kernel's names, left out where it has none."""
        sizes = {rows: self.rows, columns: self.columns}
        sizes.pop("", None)
        return {**sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


TILES: dict[Key, tuple[Tile, ...]] = {}

# Kernels with a program per user have tiles of about as many numbers, whatever the number of experts. A user has few
# items, so few warps; partial sums are up to a thousand, so tall tiles that leave two warps 64 registers a lane.
for _experts in (1, 2, 4, 8, 16, 32, 64, 128, 256):
    _rows = min(max(512 // _experts, 4), 32)
    _warps = max(1, _rows * _experts // 256)
    TILES[Key("route_users", _experts)] = (Tile(_rows, max(1024 // _experts, 8), max(2, _warps)),)
    TILES[Key("grad_logits", _experts)] = (Tile(_rows, _experts, _warps),)

# All tiles of `route_items` for one number of experts and one precision have equal columns and at most 32 rows (64 are
# multiplied by another instruction): an item's sums are then in one order however many items there are.
_MORE_EXPERTS = {
    # of route_items and grad_items; from 128 experts on float32 products are unrolled, where each further stage
    # multiplies the registers
    (32, "half"): (Tile(16, 64, 4), Tile(32, 64, 4, 2)),
    (32, "float"): (Tile(16, 64, 4), Tile(16, 64, 4, 2)),
    (64, "half"): (Tile(16, 32, 8), Tile(16, 32, 4)),
    (64, "float"): (Tile(16, 32, 8), Tile(16, 32, 8, 2)),
    (128, "half"): (Tile(16, 32, 8), Tile(16, 16, 8, 1)),
    (128, "float"): (Tile(16, 16, 4, 2), Tile(16, 16, 8, 1)),
    (256, "half"): (Tile(16, 16, 4, 2), Tile(16, 32, 8, 1)),
    (256, "float"): (Tile(16, 16, 8, 2), Tile(16, 16, 8, 1)),
}
for (_experts, _precision), (_route, _grad) in _MORE_EXPERTS.items():
    TILES |= {Key("route_items", _experts, _precision, size): (_route,) for size in ("few", "many")}
    TILES[Key("grad_items", _experts, _precision)] = (_grad,)
    TILES[Key("dispatch_backward", _experts, _precision)] = (Tile(32, 32, 8),)

# At 8 experts, as the sweep prints them. 1024 numbers are 16 bytes a lane in half precision with 4 warps.
TILES |= {
    Key("route_items", 16, "half", "few"): (Tile(16, 64, 2, 3), Tile(16, 64, 1, 4), Tile(16, 64, 4, 3)),
    Key("route_items", 16, "half", "many"): (Tile(32, 64, 2, 3), Tile(32, 64, 1, 4), Tile(32, 64, 4, 3)),
    Key("route_items", 16, "float", "few"): (Tile(16, 64, 2, 3), Tile(16, 64, 2, 4)),
    Key("route_items", 16, "float", "many"): (Tile(32, 64, 4, 4), Tile(16, 64, 2, 3), Tile(32, 64, 4, 3)),
    Key("route_users", 8): (Tile(32, 128, 2, 3), Tile(32, 256, 4, 3), Tile(32, 64, 1, 3)),
    Key("grad_logits", 8): (Tile(32, 8, 1, 3), Tile(32, 8, 2, 3)),
    Key("grad_items", 16, "half"): (Tile(32, 64, 4, 3), Tile(32, 64, 2, 3), Tile(64, 64, 4, 2)),
    Key("grad_items", 16, "float"): (Tile(32, 64, 4, 3), Tile(16, 64, 4, 3)),
    Key("sum_partials"): (Tile(128, 32, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
    Key("dispatch_backward", 16, "half"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 4), Tile(64, 32, 4, 3)),
    Key("dispatch_backward", 16, "float"): (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 32, 4, 3)),
    Key("dispatch", 0, "half"): (Tile(1, 1024, 4, 3), Tile(1, 2048, 4, 3), Tile(1, 2048, 8, 3)),
    Key("dispatch", 0, "float"): (Tile(1, 1024, 4, 3), Tile(1, 2048, 4, 3), Tile(1, 2048, 8, 3)),
    Key("combine", 0, "half"): (Tile(1, 1024, 4, 3), Tile(1, 2048, 4, 3), Tile(1, 2048, 8, 3)),
    Key("combine", 0, "float"): (Tile(1, 1024, 4, 3), Tile(1, 2048, 4, 3), Tile(1, 2048, 8, 3)),
    Key("combine_backward", 0, "half"): (Tile(1, 1024, 4, 3), Tile(1, 2048, 4, 3), Tile(1, 2048, 8, 3)),
    Key("combine_backward", 0, "float"): (Tile(1, 1024, 4, 3), Tile(1, 2048, 4, 3), Tile(1, 2048, 8, 3)),
}


def precision_of(tensor: Tensor) -> str:
    """As the keys name it."""
    return "float" if tensor.dtype == torch.float32 else "half"


def padded_experts(num_experts: int) -> int:
    """Experts of a tile that enters a matrix product."""
    return max(_MIN_DOT, triton.next_power_of_2(num_experts))


def tile(kernel: str, experts: int = 0, precision: str = "", size: str = "") -> Tile:
    """The tile that runs."""
    return TILES[Key(kernel, experts, precision, size)][0]


@contextmanager
def running(key: Key, candidate: Tile) -> Iterator[None]:
    """Let that tile run meanwhile, for a sweep or a test."""
    before = TILES[key]
    TILES[key] = (candidate,)
    try:
        yield
    finally:
        TILES[key] = before


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has, looked up once per device and process."""
    if device.type != "cuda":
        return _INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
