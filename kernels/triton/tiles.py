"""Tiles of the kernels: for whatever a tile depends on, its candidates; the first of each is the one that runs.

The order is that of a sweep, `python bench/tune_kernels.py OUT.json`, which times all candidates on a GPU and prints
the lines below anew. NOT YET TIMED: until then first comes what compiles best, without a spilled register on any
architecture and with many bytes in flight (at 8 experts 24 KiB and more per multiprocessor of an H100, where 14 KiB
hide 600 ns at 3 TB/s). tests/kernels compiles every tile that runs for every architecture, and all others for one.
Nothing is tuned at run time, so that a kernel is compiled once, and that a result does not depend on a stopwatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from torch import Tensor

_MIN_DOT = 16  # smallest side of a matrix product on tensor cores


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

    Rows are items, slabs or partial sums, columns numbers of each; a stream of numbers has columns alone. Where a user
    has a program (`route_users`), rows are his items and columns the partial sums of the batch.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 3

    def options(self, rows: str = "", columns: str = "") -> dict[str, int]:
        """As the compiler names them, rows and columns by the kernel's names, left out where it has none."""
        sizes = {rows: self.rows, columns: self.columns}
        sizes.pop("", None)
        return {**sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


def _of_users(experts: int) -> dict[Key, tuple[Tile, ...]]:
    """Kernels with a program per user: tiles of about as many numbers, whatever the number of experts.

    Nobody has many items, so few warps; partial sums are up to a thousand, so tall tiles, of as many numbers as leave
    two warps 64 registers a lane.
    """
    rows = min(max(512 // experts, 4), 32)
    warps = max(1, rows * experts // 256)
    return {
        Key("route_users", experts): (Tile(rows, max(1024 // experts, 8), max(2, warps)),),
        Key("grad_logits", experts): (Tile(rows, experts, warps),),
    }


_HALF_AND_FLOAT = ("half", "float")

TILES: dict[Key, tuple[Tile, ...]] = {}
for _experts in (1, 2, 4, 8, 16, 32, 64, 128, 256):
    TILES |= _of_users(_experts)

# All tiles of `route_items` for one number of experts and one precision have equal columns and at most 32 rows (64 are
# multiplied by another instruction): an item's sums are then in one order however many items there are.
TILES |= {
    Key("route_items", experts, precision, size): candidates
    for size in ("few", "many")
    for experts, precision, candidates in (
        (32, "half", (Tile(16, 64, 4), Tile(16, 64, 8))),
        (32, "float", (Tile(16, 64, 4), Tile(16, 64, 4, 4))),
        (64, "half", (Tile(16, 32, 8), Tile(16, 32, 8, 2))),
        (64, "float", (Tile(16, 32, 8), Tile(16, 32, 8, 2))),
        (128, "half", (Tile(16, 32, 8), Tile(16, 32, 8, 2))),
        (128, "float", (Tile(16, 16, 4, 2), Tile(16, 16, 8, 2))),
        (256, "half", (Tile(16, 16, 4, 2),)),
        (256, "float", (Tile(16, 16, 8, 2), Tile(16, 16, 8))),
    )
}
TILES |= {
    Key("grad_items", 32, "half"): (Tile(32, 64, 4, 2), Tile(16, 64, 4, 2)),
    Key("grad_items", 32, "float"): (Tile(16, 64, 4, 2), Tile(16, 32, 4)),
    Key("grad_items", 64, "half"): (Tile(16, 32, 4), Tile(16, 32, 8, 2)),
    Key("grad_items", 64, "float"): (Tile(16, 32, 8, 2), Tile(16, 32, 4)),
}
# one stage where float32 products are unrolled: each further stage multiplies the registers
TILES |= {
    Key("grad_items", 128, "half"): (Tile(16, 16, 8, 1),),
    Key("grad_items", 128, "float"): (Tile(16, 16, 8, 1),),
    Key("grad_items", 256, "half"): (Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
    Key("grad_items", 256, "float"): (Tile(16, 16, 8, 1),),
}
TILES |= {
    Key("dispatch_backward", experts, name): (Tile(32, 32, 8), Tile(32, 32, 8, 2))
    for experts in (32, 64, 128, 256)
    for name in _HALF_AND_FLOAT
}

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
    """Meanwhile that tile runs, for a sweep or a test."""
    before = TILES[key]
    TILES[key] = (candidate,)
    try:
        yield
    finally:
        TILES[key] = before
