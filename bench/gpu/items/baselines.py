"""Item 10: what takes longest to get ready: the sweep of tiles, compiled forms, other libraries, whole steps."""

import json
import os
from functools import partial

from gpu.benchmarks import Benchmark, run_benchmarks
from gpu.items.kernels import CATALOGUE, KERNELS
from gpu.work import Found, Prediction, Work, against_strongest

_SWEEP, _SWEEP_S = "sweep of tiles", 45.0
_COMPILED = (  # lines of items 3 and 6, whose forms are compiled or complete here
    "loss and gradient, 256 users, 100,000 items of 4,096",
    "RMSNorm of 4,096 x 4,096, both ways",
    "gated product of 4,096 x 14,336, both ways",
    "routing of 409,600 items, both ways",
    "routing of 5,120 items, both ways",
    "dispatch to 2,048 users, both ways",
    "combine for 2,048 users, both ways",
    "loss and gradient, 1,024 users, 1,000,000 items of 256",
)
_FLEX = "shared prefix KV and attention, against FlexAttention"
BENCHMARKS = {name: (KERNELS | CATALOGUE)[name] for name in _COMPILED} | {
    _FLEX: Benchmark(
        "bench_prefix_kv.py::test_attention_behind_a_shared_prefix", "gpu-16-shared-plain", "cpu-16-shared-plain"
    ),
    "M-Former's bookkeeping for 256 users, both ways": Benchmark(
        "bench_mformer.py::test_bookkeeping",
        "gpu-small-graph-forward+backward",
        "cpu-demo-plain-forward+backward",
        Prediction(2.0, "36 launches of about 5 us against 2 or 3", of="speedup"),
        "route_experts",
    ),
}
_STEPS = {  # by the name of `reporting.baselines`
    "whole step beside padded": "padded",
    "whole step beside peft's prompts": "peft",
    "whole step beside the authors' form": "authors",
}
_REHEARSED = (_COMPILED[1], _FLEX)


def names(rehearse: bool) -> list[str]:
    """The sweep, benchmarks, whole steps; of a rehearsal what items 3 and 6 have not shown to run."""
    return [_SWEEP, *(_REHEARSED if rehearse else BENCHMARKS), *_STEPS]


def run(work: Work) -> None:
    """Everything that is installed."""
    work.measure(_SWEEP, partial(_sweep, work), attention="none")
    run_benchmarks(work, BENCHMARKS)
    for name, comparison in _STEPS.items():
        work.measure(name, partial(_step, work, comparison), attention="mixed")


def _sweep(work: Work) -> Found:
    """Candidates that were faster than the tile that runs; the whole table lies in tiles.json beside the results."""
    if work.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import tune_kernels

    out = work.folder.parent / "tiles.json"
    words = ["--seconds", f"{_SWEEP_S:g}", *(["--rehearse"] if work.rehearse else [])]
    tune_kernels.main([str(out), *words])
    found = json.loads(out.read_text(encoding="utf-8"))
    faster = sum(row["was_first"] > 0 for row in found["tiles"])
    return Found(faster, f"of {len(found['tiles'])} tiles have a faster one", more={"left_out": found["left_out"]})


def _step(work: Work, comparison: str) -> Found:
    from peak_memory import release
    from reporting.baselines import COMPARISONS, OURS
    from reporting.context import Deadline
    from reporting.models import usable_weights
    from reporting.reasons import Skip, package_missing

    if comparison == "peft" and package_missing("peft"):
        raise Skip("no peft")
    release()
    context = work.context
    weights = usable_weights(context)[0][0]
    rows = COMPARISONS[comparison](context, context.settings.waterfall[0], weights, Deadline(work.left_s / 2))
    others = {row["form"]: row["ours_is_faster_by"] for row in rows if "seconds" in row and row["form"] != OURS}
    (ours,) = [row for row in rows if row["form"] == OURS]
    found = Found(1e3 * ours["seconds"], "ms", more={"rows": rows, "weights": weights})
    return against_strongest(found, others)
