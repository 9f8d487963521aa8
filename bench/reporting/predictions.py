"""What was predicted before anything ran, and from what: the column beside every measurement."""

from typing import NamedTuple


class Prediction(NamedTuple):
    """One figure that a benchmark is held against.

    Attributes:
        benchmark: every word of it occurs in the benchmark's name, function and case.
        figure: in its `extra_info`, or "share_of_limit": time at the roofs over the time that it took.
        value: at least that much; where a range was predicted, its lower end.
        unit: "x" for ratios, "share" for shares of a roof.
        device: for which it was made.
        source: what it was derived from.
    """

    benchmark: str
    figure: str
    value: float
    unit: str
    device: str
    source: str


def _faster(benchmark: str, other: str, value: float, source: str) -> Prediction:
    return Prediction(benchmark, f"speedup_over_{other}", value, "x", "H100", source)


def _share(benchmark: str, value: float, source: str, figure: str = "share_of_limit") -> Prediction:
    return Prediction(benchmark, figure, value, "share", "H100", source)


_LAUNCHES = "36 launches of about 5 us against 2 or 3"
_BYTES = "bytes that must be read and written, at the usual share of a good kernel"
_SMALL, _LARGE = "gpu-small forward+backward", "gpu-large forward+backward"

KERNELS = (
    _faster(f"route_experts {_SMALL}", "topk_one_hot", 6.0, _LAUNCHES),
    _faster(f"route_experts {_SMALL}", "compiled_index_add", 2.0, "fewer passes over X"),
    _share(f"route_experts {_LARGE}", 0.85, _BYTES),
    _faster(f"route_experts {_LARGE}", "topk_one_hot", 3.0, "top-k and one-hot take most there"),
    _share(f"dispatch_queries {_LARGE}", 0.85, _BYTES),
    _faster(f"dispatch_queries {_LARGE}", "indexing", 5.0, "a sort and a sum in series for each"),
    _faster(f"dispatch_queries {_LARGE}", "one_hot", 1.2, "one pass over the gradient"),
    _share(f"combine_queries {_LARGE}", 0.85, _BYTES),
    _faster(f"combine_queries {_LARGE}", "sum", 2.5, "k products and sums in one pass"),
    _share("inject_prefix_kv gpu-128", 0.85, _BYTES),
    _faster("inject_prefix_kv gpu-16", "index_copy", 4.0, "bound by launches"),
    _faster("inject_prefix_kv gpu-128", "index_copy", 1.3, "one pass in place of two"),
    _share("catalog_cross_entropy frozen product", 0.74, "1.35 times the floor"),
    _faster("catalog_cross_entropy broadcast", "broadcast", 100.0, "29 passes over a large cube"),
    _faster("catalog_cross_entropy product", "product", 1.2, "the gain is memory where it fits"),
    _share("catalog_topk", 0.8, "one read of the table"),
    _faster("catalog_topk", "product", 2.0, "no scores are written"),
)

# of an 8B model from 4,096 packed tokens on, nothing recomputed
STEP_SHARE = _share("step", 0.7, "products at 75% of the peak and one pass for everything else", "share_of_floor")
STEP_SHARE_NF4 = _share("step", 0.6, "as above, with 4-bit weights unpacked twice a step", "share_of_floor")

WATERFALL = {  # gain of each switch over the state before it, of an 8B model in 4 bits and 4,096 tokens on an H100
    "packing": 2.27,
    "fused norms, MLPs and rotation": 1.20,
    "one unpacking for recomputation and backward": 1.02,
    "gate and up alone recomputed": 1.17,
    "nothing recomputed": 1.25,
    "last layer for what is read out": 1.03,
    "weights not packed": 1.07,
}
_PADDING_RATIO = 2.34  # for which packing was predicted


def packing_gain(padding_ratio: float) -> float:
    """Predicted gain of packing where the padded form computes so many times the useful tokens."""
    return WATERFALL["packing"] * padding_ratio / _PADDING_RATIO


def predictions_for(benchmark: str) -> list[Prediction]:
    """Those that a benchmark of this name is held against."""
    return [known for known in KERNELS if all(word in benchmark for word in known.benchmark.split())]


def on_any_device(benchmark: str, figure: str) -> Prediction | None:
    """The prediction for the same operation and figure in any case: shown where the device is another one."""
    same = (known for known in KERNELS if known.figure == figure and known.benchmark.split()[0] in benchmark)
    return next(same, None)
