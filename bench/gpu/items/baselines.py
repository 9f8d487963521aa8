"""Item 10: what takes longest to get ready: the sweep of tiles, compiled forms, other libraries, whole steps."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu.benchmarks import Benchmark, run_benchmarks
from gpu.items.catalogue import CATALOGUE
from gpu.items.kernels import KERNELS
from gpu.work import Found, Prediction, Work

if TYPE_CHECKING:
    from collections.abc import Callable

_SWEEP, _SWEEP_S = "sweep of tiles", 45.0
_FLEX = "bench_prefix_kv.py::test_attention_behind_a_shared_prefix"
_LAUNCHES = "36 launches of about 5 us against 2 or 3"
_COMPILED = {  # the names of items 3 and 6, whose forms are compiled or complete here
    "loss and gradient, 256 users, 100,000 items of 4,096": CATALOGUE,
    "RMSNorm of 4,096 x 4,096, both ways": KERNELS,
    "gated product of 4,096 x 14,336, both ways": KERNELS,
    "routing of 409,600 items, both ways": KERNELS,
    "routing of 5,120 items, both ways": KERNELS,
    "dispatch to 2,048 users, both ways": KERNELS,
    "combine for 2,048 users, both ways": KERNELS,
    "loss and gradient, 1,024 users, 1,000,000 items of 256": CATALOGUE,
}
BENCHMARKS = {name: table[name] for name, table in _COMPILED.items()} | {
    "shared prefix KV and attention, against FlexAttention": Benchmark(
        _FLEX, "gpu-16-shared-plain", "cpu-16-shared-plain"
    ),
    "M-Former's bookkeeping for 256 users, both ways": Benchmark(
        "bench_mformer.py::test_bookkeeping",
        "gpu-small-graph-forward+backward",
        "cpu-demo-plain-forward+backward",
        Prediction(2.0, _LAUNCHES, of="speedup"),
        "route_experts",
    ),
}
_STEPS = {  # by the name of `reporting.baselines`
    "whole step beside padded": "padded",
    "whole step beside peft's prompts": "peft",
    "whole step beside the authors' form": "authors",
}
_REHEARSED = ("RMSNorm of 4,096 x 4,096, both ways", "shared prefix KV and attention, against FlexAttention")


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
    from reporting.baselines import COMPARISONS, OURS
    from reporting.context import Deadline, package_missing
    from reporting.memory import release
    from reporting.models import usable_weights
    from reporting.reasons import Skip

    if comparison == "peft" and package_missing("peft"):
        raise Skip("no peft")
    release()
    context = work.context
    compare: Callable[..., list[dict[str, Any]]] = COMPARISONS[comparison]
    weights = usable_weights(context)[0][0]
    rows = compare(context, context.settings.waterfall[0], weights, Deadline(work.left_s / 2))
    others = {row["form"]: row["ours_is_faster_by"] for row in rows if "seconds" in row and row["form"] != OURS}
    (ours,) = [row for row in rows if row["form"] == OURS]
    baseline = min(others, key=others.__getitem__, default=None)
    return Found(
        1e3 * ours["seconds"],
        "ms",
        baseline=baseline,
        speedup=others[baseline] if baseline else None,
        more={"rows": rows, "weights": weights},
    )
