"""Item 3: single operations in CUDA graphs, each beside its strongest other form, the roof and what was predicted."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from gpu.benchmarks import Benchmark, names_of, run_benchmarks
from gpu.work import Found, Prediction, Work

if TYPE_CHECKING:
    from reporting.roofs import Roofs

_COPY, _PRODUCT = "roof: copy", "roof: product in {}"
_BOTH = "graph-forward+backward"


def _moved(value: float, megabytes: float, share: float) -> Prediction:
    return Prediction(value, f"{megabytes:,.0f} MB at {share:.0%} of 3.0 TB/s", bound="memory")


KERNELS = {
    "routing of 409,600 items, both ways": Benchmark(
        "bench_routing.py::test_route_experts",
        f"gpu-large-{_BOTH}",
        "cpu-demo-plain-forward+backward",
        _moved(750, 1914, 0.85),
        "route_experts",
    ),
    "attention of packed prompts, both ways": Benchmark(
        "bench_attention.py::test_varlen_attention", "amazon-scientific", "amazon-scientific"
    ),
    "4-bit weight of 14,336 x 4,096 unpacked": Benchmark(
        "bench_frozen.py::test_unpack", "gpu-graph", "cpu-plain", _moved(58, 147, 0.85)
    ),
    "RMSNorm of 4,096 x 4,096, both ways": Benchmark(
        "bench_frozen.py::test_rms_norm", f"gpu-{_BOTH}", "cpu-plain-forward+backward", _moved(66, 168, 0.85)
    ),
    "gated product of 4,096 x 14,336, both ways": Benchmark(
        "bench_frozen.py::test_gated_product", f"gpu-{_BOTH}", "cpu-plain-forward+backward", _moved(368, 939, 0.85)
    ),
    "rotation of queries and keys, 4,096 tokens": Benchmark(
        "bench_frozen.py::test_rotary", "gpu-graph-forward", "cpu-plain-forward", _moved(33, 83.9, 0.85)
    ),
    "dispatch to 2,048 users, both ways": Benchmark(
        "bench_dispatch.py::test_dispatch_queries",
        f"gpu-large-{_BOTH}",
        "cpu-demo-plain-forward+backward",
        _moved(237, 605, 0.85),
        "dispatch_queries",
    ),
    "combine for 2,048 users, both ways": Benchmark(
        "bench_dispatch.py::test_combine_queries",
        f"gpu-large-{_BOTH}",
        "cpu-demo-plain-forward+backward",
        _moved(434, 1108, 0.85),
        "combine_queries",
    ),
    "shared prefix KV, 16 x 256 tokens": Benchmark(
        "bench_prefix_kv.py::test_inject_prefix_kv",
        "gpu-16-shared-graph-forward",
        "cpu-16-shared-plain-forward",
        _moved(14, 35.8, 0.85),
        "inject_prefix_kv",
    ),
    "routing of 5,120 items, both ways": Benchmark(
        "bench_routing.py::test_route_experts",
        f"gpu-small-{_BOTH}",
        "cpu-demo-plain-forward",
        Prediction(25, "five launches; all of it fits into the cache"),
        "route_experts",
    ),
    "routing of 409,600 items": Benchmark(
        "bench_routing.py::test_route_experts",
        "gpu-large-graph-forward",
        "cpu-demo-plain-backward",
        _moved(252, 642.5, 0.85),
        "route_experts",
    ),
    "dispatch to 2,048 users": Benchmark(
        "bench_dispatch.py::test_dispatch_queries",
        "gpu-large-graph-forward",
        "cpu-demo-plain-forward",
        _moved(112, 302, 0.9),
        "dispatch_queries",
    ),
    "combine for 2,048 users": Benchmark(
        "bench_dispatch.py::test_combine_queries",
        "gpu-large-graph-forward",
        "cpu-demo-plain-forward",
        _moved(149, 403, 0.9),
        "combine_queries",
    ),
    "shared prefix KV, 128 x 128 tokens": Benchmark(
        "bench_prefix_kv.py::test_inject_prefix_kv",
        "gpu-128-shared-graph-forward",
        "cpu-16-shared-plain-backward",
        _moved(59, 151, 0.85),
        "inject_prefix_kv",
    ),
}


def names(rehearse: bool) -> list[str]:
    """Roofs and kernels."""
    return [_COPY, *(_PRODUCT.format(dtype) for dtype in _dtypes(rehearse)), *names_of(KERNELS, rehearse)]


def _dtypes(rehearse: bool) -> list[str]:
    return ["float32"] if rehearse else ["bfloat16", "float32"]


def run(work: Work) -> None:
    """Roofs first: every share is one of theirs."""
    work.measure(_COPY, lambda: _copy(work.context.roofs), attention="none")
    for dtype in _dtypes(work.rehearse):
        work.measure(_PRODUCT.format(dtype), partial(_product, work, dtype), attention="none")
    run_benchmarks(work, KERNELS, options=["--quick"])


def _copy(roofs: Roofs) -> Found:
    return Found(roofs.copy_gb_per_s, "GB/s", prediction=Prediction(3000, "data sheet less a tenth", bound="memory"))


def _product(work: Work, dtype: str) -> Found:
    expected = Prediction(798, "measured in public on the chip") if dtype == "bfloat16" else None
    return Found(work.context.roofs.matmul_tflops[dtype], "TFLOP/s", prediction=expected)
