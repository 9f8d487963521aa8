"""Times every candidate tile of the kernels on the GPU at hand, and prints the order for kernels/triton/tiles.py.

    python bench/tune_kernels.py OUT.json              # on a GPU, in less than a minute
    python bench/tune_kernels.py OUT.json --rehearse   # tiny shapes in Triton's interpreter; no figure is kept

Each candidate runs in a CUDA graph with a cold cache, all of one tile in turn, on the workloads of workloads.py with 8
experts; a tile of both sizes is judged by the mean of its times relative to the best. Other numbers of experts keep
the tiles that they have.
"""

import os
import sys

if "--rehearse" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import argparse
import json
import platform
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import triton
from forms import relative_error
from timing import Captured, Run, clock_of, interleaved_medians
from torch import Tensor
from workloads import DISPATCH, ROUTING, Case, Workload

from laser_fast.kernels import dispatch, routing
from laser_fast.kernels.routing_backward import route_backward
from laser_fast.kernels.tiles import TILES, Key, Tile, running
from laser_fast.ops import cu_seqlens_from_lengths

Tiles = tuple[Tile, ...]
Launch = Callable[[], Iterable[Tensor]]

_BUDGET_S = 0.3  # of timing, for all candidates of one tile and workload
_MARGIN = 0.98  # of the time of the tile that runs now; less of a gain would be noise
_STREAMS = ("dispatch", "combine", "combine_backward", "dispatch_backward")
_EXPERTS = {"route_users": 8, "grad_logits": 8}  # 8 as they are; elsewhere padded to 16, or of no importance
_REHEARSED = {
    "gpu-small": Workload("cpu", 2, 3, 20, 2, torch.float16),
    "gpu-large": Workload("cpu", 4, 5, 20, 2, torch.float16),
}


def swept_keys() -> list[Key]:
    """The tiles of the authors' sizes of which there is more than one."""
    keys = [key for key, tiles in TILES.items() if len(tiles) > 1]
    return [key for key in keys if key.experts in (0, _EXPERTS.get(key.kernel, 16))]


def workloads_of(key: Key, rehearse: bool) -> dict[str, Workload]:
    """Where a tile runs: by kernel, size of the batch and precision."""
    cases: list[Case] = DISPATCH if key.kernel in _STREAMS else ROUTING
    found = {case.name: case.workload for case in cases if case.mode == "graph"}
    if rehearse:
        found = _REHEARSED
    names = {"few": ["gpu-small"], "many": ["gpu-large"]}.get(key.size, list(found))
    dtypes = {"dtype": torch.float32} if key.precision == "float" else {}
    return {name: found[name]._replace(**dtypes) for name in names}


def launch_of(key: Key, shape: Workload) -> Launch:
    """The launcher of a kernel, on random inputs; what it gives is compared between candidates."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def normal(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=shape.device).to(dtype)

    if key.kernel in _STREAMS:
        scores = normal(shape.users, shape.experts, dtype=torch.float32)
        expert = scores.argsort(dim=1)[:, : shape.top_k].int()
        weight, outputs = scores[:, : shape.top_k].softmax(dim=1), normal(expert.numel(), shape.queries, shape.width)
        queries, grad = normal(shape.experts, shape.queries, shape.width), normal(shape.users, *outputs.shape[1:])
        needs = {"needs_outputs": True, "needs_weight": True}
        launches: dict[str, Launch] = {
            "dispatch": lambda: [dispatch.dispatch_forward(queries, expert)],
            "combine": lambda: [dispatch.combine_forward(outputs, weight)],
            "combine_backward": lambda: dispatch.combine_backward(grad, outputs, weight, **needs),
            "dispatch_backward": lambda: [dispatch.dispatch_backward(outputs, expert, shape.experts)],
        }
        return launches[key.kernel]
    states, router = (
        normal(shape.users * shape.items, shape.width),
        normal(shape.experts, shape.width) / shape.width**0.5,
    )
    bias = normal(shape.experts, dtype=torch.float32)
    cu_seqlens = cu_seqlens_from_lengths(torch.full((shape.users,), shape.items)).to(shape.device)
    forward = (states, router, bias, cu_seqlens, shape.top_k, "softmax")
    if key.kernel in ("route_items", "route_users"):
        return lambda: routing.route_forward(*forward)[1:3]  # two near-ties may change places, these stay
    result = routing.route_forward(*forward)
    grads = torch.ones_like(result.weight), normal(*result.pooled.shape, dtype=torch.float32), result.balance_loss
    arguments = (grads, states, router, cu_seqlens, result)
    return lambda: route_backward(*arguments, weighting="softmax", needs=(True, True))


def _of_candidate(key: Key, candidate: Tile, launch: Launch) -> Launch:
    def run() -> Iterable[Tensor]:
        with running(key, candidate):
            return launch()

    return run


def assert_same(key: Key, launches: dict[Tile, Launch]) -> None:
    """Every candidate computes what the first does, but for rounding."""
    first, *others = launches
    expected = list(launches[first]())
    for candidate in others:
        for actual, wanted in zip(launches[candidate](), expected, strict=True):
            error = relative_error(actual.flatten(), wanted.flatten())
            assert error < 1e-2, f"{key}: {candidate} is off by {error:.1e}"


def measure(key: Key, shape: Workload) -> dict[Tile, float]:
    """Seconds of every candidate; in Triton's interpreter each only runs."""
    launch = launch_of(key, shape)
    launches = {candidate: _of_candidate(key, candidate, launch) for candidate in TILES[key]}
    assert_same(key, launches)
    if shape.device == "cpu":
        return dict.fromkeys(launches, 1.0)
    captured: dict[str, Run] = {str(tile): Captured(lambda run=run: run) for tile, run in launches.items()}
    medians = interleaved_medians(captured, clock_of("graph", torch.device(shape.device)), _BUDGET_S)
    return {tile: medians[str(tile)] for tile in launches}


def ordered(tiles: Tiles, seconds: dict[str, dict[Tile, float]]) -> Tiles:
    """Best first; the one that runs now stays there unless another is better by more than the noise."""

    def score(tile: Tile) -> float:
        return sum(of[tile] / min(of.values()) for of in seconds.values()) / len(seconds)

    best = sorted(tiles, key=score)
    if score(best[0]) > _MARGIN * score(tiles[0]):
        best.remove(tiles[0])
        best.insert(0, tiles[0])
    return tuple(best)


def line(key: Key, tiles: Tiles) -> str:
    """As it stands in tiles.py."""
    parts = list(key)
    while not parts[-1]:
        parts.pop()
    candidates = ", ".join(f"Tile{tuple(tile)}" for tile in tiles)
    return f"    Key({', '.join(json.dumps(part) for part in parts)}): ({candidates}),"


def sweep(rehearse: bool, limit_s: float) -> dict[str, Any]:
    """Measured tiles, and the keys for which no time was left."""
    start, found, left_out = perf_counter(), [], []
    for key in swept_keys():
        if perf_counter() - start > limit_s:
            left_out.append(str(key))
            continue
        seconds = {name: measure(key, shape) for name, shape in workloads_of(key, rehearse).items()}
        tiles = ordered(TILES[key], seconds)
        print(line(key, tiles), flush=True)
        times = {name: [round(1e6 * of[tile], 2) for tile in tiles] for name, of in seconds.items()}
        row = {
            "key": key._asdict(),
            "tiles": [tile._asdict() for tile in tiles],
            "was_first": tiles.index(TILES[key][0]),
        }
        found.append(row if rehearse else row | {"median_us": times})
    return {"tiles": found, "left_out": left_out}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in the interpreter, no figure kept")
    parser.add_argument("--seconds", type=float, default=50.0, help="no tile is begun after that time")
    given = parser.parse_args(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("needs a CUDA device, and torch sees none; --rehearse runs without")
    facts = {
        "command": f"python bench/tune_kernels.py {given.out.name}" + (" --rehearse" if given.rehearse else ""),
        "device": "Triton's interpreter" if given.rehearse else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
    }
    small = mock.patch.object(routing, "SMALL_BATCH", 10)  # so that one of the tiny workloads is large
    with small if given.rehearse else nullcontext():
        facts |= sweep(given.rehearse, given.seconds)
    given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if facts["left_out"]:
        print(f"left out after {given.seconds:.0f} s: {', '.join(facts['left_out'])}", file=sys.stderr)
    return int(bool(facts["left_out"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
