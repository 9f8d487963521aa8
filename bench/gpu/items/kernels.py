"""Items 3 and 6: single operations in CUDA graphs, and the loss over a catalogue and its top-k.

Each stands beside its strongest other form, the roof and what was predicted; compiled forms and other libraries are
item 10.
"""

from functools import partial

from gpu.benchmarks import Benchmark, names_of, run_benchmarks
from gpu.work import Found, Prediction, Work

_COPY, _PRODUCT = "roof: copy", "roof: product in {}"


def _on_gpu(
    test: str, case: str, rehearsed: str, predicted: Prediction | None = None, operation: str | None = None
) -> Benchmark:
    """A benchmark in a CUDA graph on a GPU, and plain in the rehearsal."""
    shape, _, passes = case.rpartition(" ")
    small, _, small_passes = rehearsed.rpartition(" ")
    return Benchmark(f"bench_{test}", f"{shape}-graph-{passes}", f"{small}-plain-{small_passes}", predicted, operation)


def _moved(value: float, megabytes: float, share: float = 0.85) -> Prediction:
    return Prediction(value, f"{megabytes:,.0f} MB at {share:.0%} of 3.0 TB/s", bound="memory")


_ROUTE, _DISPATCH = "routing.py::test_route_experts", "dispatch.py::test_dispatch_queries"
_COMBINE, _INJECT = "dispatch.py::test_combine_queries", "prefix_kv.py::test_inject_prefix_kv"
_BOTH, _DEMO = "forward+backward", "cpu-demo"

KERNELS = {
    "routing of 409,600 items, both ways": _on_gpu(
        _ROUTE, f"gpu-large {_BOTH}", f"{_DEMO} {_BOTH}", _moved(750, 1914), "route_experts"
    ),
    "attention of packed prompts, both ways": Benchmark(
        "bench_attention.py::test_varlen_attention", "amazon-scientific", "amazon-scientific"
    ),
    "4-bit weight of 14,336 x 4,096 unpacked": Benchmark(
        "bench_frozen.py::test_unpack", "gpu-graph", "cpu-plain", _moved(58, 147)
    ),
    "RMSNorm of 4,096 x 4,096, both ways": _on_gpu(
        "frozen.py::test_rms_norm", f"gpu {_BOTH}", f"cpu {_BOTH}", _moved(66, 168)
    ),
    "gated product of 4,096 x 14,336, both ways": _on_gpu(
        "frozen.py::test_gated_product", f"gpu {_BOTH}", f"cpu {_BOTH}", _moved(368, 939)
    ),
    "rotation of queries and keys, 4,096 tokens": _on_gpu(
        "frozen.py::test_rotary", "gpu forward", "cpu forward", _moved(33, 83.9)
    ),
    "dispatch to 2,048 users, both ways": _on_gpu(
        _DISPATCH, f"gpu-large {_BOTH}", f"{_DEMO} {_BOTH}", _moved(237, 605), "dispatch_queries"
    ),
    "combine for 2,048 users, both ways": _on_gpu(
        _COMBINE, f"gpu-large {_BOTH}", f"{_DEMO} {_BOTH}", _moved(434, 1108), "combine_queries"
    ),
    "shared prefix KV, 16 x 256 tokens": _on_gpu(
        _INJECT, "gpu-16-shared forward", "cpu-16-shared forward", _moved(14, 35.8), "inject_prefix_kv"
    ),
    "routing of 5,120 items, both ways": _on_gpu(
        _ROUTE,
        f"gpu-small {_BOTH}",
        f"{_DEMO} forward",
        Prediction(25, "five launches; all of it fits into the cache"),
        "route_experts",
    ),
    "routing of 409,600 items": _on_gpu(
        _ROUTE, "gpu-large forward", f"{_DEMO} backward", _moved(252, 642.5), "route_experts"
    ),
    "dispatch to 2,048 users": _on_gpu(
        _DISPATCH, "gpu-large forward", f"{_DEMO} forward", _moved(112, 302, 0.9), "dispatch_queries"
    ),
    "combine for 2,048 users": _on_gpu(
        _COMBINE, "gpu-large forward", f"{_DEMO} forward", _moved(149, 403, 0.9), "combine_queries"
    ),
    "shared prefix KV, 128 x 128 tokens": _on_gpu(
        _INJECT, "gpu-128-shared forward", "cpu-16-shared backward", _moved(59, 151), "inject_prefix_kv"
    ),
}


def _loss(size: str, passes: str, us: float, source: str, bound: str) -> Benchmark:
    test, predicted = "bench_catalog.py::test_catalog_cross_entropy_half", Prediction(us, source, bound=bound)
    return Benchmark(test, f"cuda-{size}-{passes}", f"cpu-8-500-32-{passes}", predicted, "catalog_cross_entropy")


def _topk(size: str, us: float, source: str) -> Benchmark:
    test, predicted = "bench_catalog.py::test_catalog_topk_half", Prediction(us, source, bound="memory")
    return Benchmark(test, f"cuda-{size}", "cpu-8-500-32", predicted, "catalog_topk")


CATALOGUE = {  # a frozen table in bfloat16
    "loss and gradient, 256 users, 100,000 items of 4,096": _loss(
        "256-100000-4096", _BOTH, 985, "629 GFLOP in 788 us, 1.25 times that", "products"
    ),
    "loss, 256 users, 100,000 items of 4,096": _loss(
        "256-100000-4096", "forward", 343, "one read of 821 MB in 274 us, 80 % of that speed", "memory"
    ),
    "top-k, 64 users, 1,000,000 items of 256": _topk("64-1000000-256", 215, "512 MB in 171 us, 80 % of that speed"),
    "top-k, 1 user, 1,000,000 items of 256": _topk("1-1000000-256", 215, "512 MB in 171 us, 80 % of that speed"),
    "loss and gradient, 1,024 users, 1,000,000 items of 256": _loss(
        "1024-1000000-256", _BOTH, 1774, "1,049 GFLOP in 1,314 us, 1.35 times that", "products"
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
    """Roofs and kernels."""
    return [_COPY, *(_PRODUCT.format(dtype) for dtype in _dtypes(rehearse)), *names_of(KERNELS, rehearse)]


def catalogue_names(rehearse: bool) -> list[str]:
    """Losses and top-k."""
    return names_of(CATALOGUE, rehearse)


def _dtypes(rehearse: bool) -> list[str]:
    return ["float32"] if rehearse else ["bfloat16", "float32"]


def run(work: Work) -> None:
    """Roofs first: every share is one of theirs."""
    work.measure(_COPY, partial(_copy, work), attention="none")
    for dtype in _dtypes(work.rehearse):
        work.measure(_PRODUCT.format(dtype), partial(_product, work, dtype), attention="none")
    run_benchmarks(work, KERNELS, options=["--quick"])


def run_catalogue(work: Work) -> None:
    """The same without roofs."""
    run_benchmarks(work, CATALOGUE, options=["--quick"])


def _copy(work: Work) -> Found:
    expected = Prediction(3000, "data sheet less a tenth", bound="memory")
    return Found(work.context.roofs.copy_gb_per_s, "GB/s", prediction=expected)


def _product(work: Work, dtype: str) -> Found:
    expected = Prediction(798, "measured in public on the chip") if dtype == "bfloat16" else None
    return Found(work.context.roofs.matmul_tflops[dtype], "TFLOP/s", prediction=expected)
