"""What was predicted before anything ran, and from what: the column beside every measurement."""

from __future__ import annotations

from typing import NamedTuple


class Prediction(NamedTuple):
    """One figure that a benchmark is held against.

    Attributes:
        benchmark: part of its name, function and case: every word must occur in it.
        figure: of its `extra_info`, or "share_of_limit": time at the roofs over the time that it took.
        value: at least.
        unit: "x" for ratios, "share" for shares of a roof.
        device: for which it was made.
        source: from what it was derived.
    """

    benchmark: str
    figure: str
    value: float
    unit: str
    device: str
    source: str


_BOTH = "forward+backward"
_LAUNCHES = "36 launches of about 5 us against 2 or 3"
_BYTES = "bytes that must be read and written, at the usual share of a good kernel"
_LARGE = f"gpu-large {_BOTH}"

KERNELS = (
    Prediction(f"route_experts gpu-small {_BOTH}", "speedup_over_topk_one_hot", 6.0, "x", "H100", _LAUNCHES),
    Prediction(
        f"route_experts gpu-small {_BOTH}", "speedup_over_compiled_index_add", 2.0, "x", "H100", "fewer passes over X"
    ),
    Prediction(f"route_experts {_LARGE}", "share_of_limit", 0.85, "share", "H100", _BYTES),
    Prediction(
        f"route_experts {_LARGE}", "speedup_over_topk_one_hot", 3.0, "x", "H100", "top-k and one-hot take most there"
    ),
    Prediction(f"dispatch_queries {_LARGE}", "share_of_limit", 0.85, "share", "H100", _BYTES),
    Prediction(
        f"dispatch_queries {_LARGE}", "speedup_over_indexing", 5.0, "x", "H100", "a sort and a sum in series for each"
    ),
    Prediction(f"dispatch_queries {_LARGE}", "speedup_over_one_hot", 1.2, "x", "H100", "one pass over the gradient"),
    Prediction(f"combine_queries {_LARGE}", "share_of_limit", 0.85, "share", "H100", _BYTES),
    Prediction(f"combine_queries {_LARGE}", "speedup_over_sum", 2.5, "x", "H100", "k products and sums in one pass"),
    Prediction("inject_prefix_kv gpu-128", "share_of_limit", 0.85, "share", "H100", _BYTES),
    Prediction("inject_prefix_kv gpu-16", "speedup_over_index_copy", 4.0, "x", "H100", "bound by launches"),
    Prediction("inject_prefix_kv gpu-128", "speedup_over_index_copy", 1.3, "x", "H100", "one pass in place of two"),
    Prediction("catalog_cross_entropy frozen product", "share_of_limit", 0.74, "share", "H100", "1.35 times the floor"),
    Prediction(
        "catalog_cross_entropy broadcast", "speedup_over_broadcast", 100.0, "x", "H100", "29 passes over a large cube"
    ),
    Prediction(
        "catalog_cross_entropy product", "speedup_over_product", 1.2, "x", "H100", "the gain is memory where it fits"
    ),
    Prediction("catalog_topk", "share_of_limit", 0.8, "share", "H100", "one read of the table"),
    Prediction("catalog_topk", "speedup_over_product", 2.0, "x", "H100", "no scores are written"),
)
"""At least that much; where a range was predicted, its lower end."""

STEP_SHARE = Prediction(
    "step", "share_of_floor", 0.7, "share", "H100", "products at 75% of the peak and one pass for everything else"
)
"""From 4,096 packed tokens of an 8B model on, nothing recomputed."""

STEP_SHARE_NF4 = Prediction(
    "step", "share_of_floor", 0.6, "share", "H100", "as above, with 4-bit weights unpacked twice a step"
)

WATERFALL = {  # "nothing else changed" is 1; of an 8B model in 4 bits and 4,096 tokens on an H100
    "packing": 2.27,
    "fused norms, MLPs and rotation": 1.20,
    "one unpacking for recomputation and backward": 1.02,
    "gate and up alone recomputed": 1.17,
    "nothing recomputed": 1.25,
    "last layer for what is read out": 1.03,
    "weights not packed": 1.07,
}
"""Gain of each switch over the state before it; the head of the language model was never there."""

_PADDING_RATIO = 2.34  # for which packing was predicted


def packing_gain(padding_ratio: float) -> float:
    """Predicted gain of packing where the padded form computes so many times the useful tokens."""
    return WATERFALL["packing"] * padding_ratio / _PADDING_RATIO


def predictions_for(benchmark: str) -> list[Prediction]:
    """Those that a benchmark of this name is held against."""
    return [known for known in KERNELS if all(word in benchmark for word in known.benchmark.split())]


def on_any_device(benchmark: str, figure: str) -> Prediction | None:
    """The prediction for the same operation and figure in whatever case: shown where the device is another one."""
    for known in KERNELS:
        if known.figure == figure and known.benchmark.split()[0] in benchmark:
            return known
    return None
