"""Item 6: the loss over a catalogue and its top-k, a frozen table in bfloat16."""

from __future__ import annotations

from gpu.benchmarks import Benchmark, names_of, run_benchmarks
from gpu.work import Prediction, Work

_LOSS, _TOPK = "bench_catalog.py::test_catalog_cross_entropy_half", "bench_catalog.py::test_catalog_topk_half"
_TINY = "cpu-8-500-32"


def _loss(size: str, name: str, us: float, source: str, bound: str) -> Benchmark:
    expected = Prediction(us, source, bound=bound)
    return Benchmark(_LOSS, f"cuda-{size}-{name}", f"{_TINY}-{name}", expected, "catalog_cross_entropy")


def _topk(size: str, us: float, source: str) -> Benchmark:
    return Benchmark(_TOPK, f"cuda-{size}", _TINY, Prediction(us, source, bound="memory"), "catalog_topk")


CATALOGUE = {
    "loss and gradient, 256 users, 100,000 items of 4,096": _loss(
        "256-100000-4096", "forward+backward", 985, "629 GFLOP in 788 us, 1.25 times that", "products"
    ),
    "loss, 256 users, 100,000 items of 4,096": _loss(
        "256-100000-4096", "forward", 343, "one read of 821 MB in 274 us, 80 % of that speed", "memory"
    ),
    "top-k, 64 users, 1,000,000 items of 256": _topk("64-1000000-256", 215, "512 MB in 171 us, 80 % of that speed"),
    "top-k, 1 user, 1,000,000 items of 256": _topk("1-1000000-256", 215, "512 MB in 171 us, 80 % of that speed"),
    "loss and gradient, 1,024 users, 1,000,000 items of 256": _loss(
        "1024-1000000-256", "forward+backward", 1774, "1,049 GFLOP in 1,314 us, 1.35 times that", "products"
    ),
    "loss, 1,024 users, 1,000,000 items of 256": _loss(
        "1024-1000000-256", "forward", 821, "524 GFLOP in 657 us, 80 % of that speed", "products"
    ),
    "loss, 256 users, 1,000,000 items of 4,096": _loss(
        "256-1000000-4096", "forward", 3414, "one read of 8,194 MB in 2,731 us, 80 % of that speed", "memory"
    ),
    "top-k, 256 users, 1,000,000 items of 4,096": _topk(
        "256-1000000-4096", 3414, "8,194 MB in 2,731 us, 80 % of that speed"
    ),
}


def names(rehearse: bool) -> list[str]:
    """Losses and top-k."""
    return names_of(CATALOGUE, rehearse)


def run(work: Work) -> None:
    """Without compiled forms and other libraries: those are item 10."""
    run_benchmarks(work, CATALOGUE, options=["--quick"])
