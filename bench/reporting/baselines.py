"""Section "baselines": our whole step beside Hugging Face's padded form, peft's prompts and the authors' form."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from baselines.authors_step import NEGATIVES, AuthorsStep, AuthorsWorkload
from baselines.padded_step import PaddedStep, padded_forms
from forms import relative_error
from peak_memory import release
from steps import (
    StepShape,
    build_laser,
    counted_tokens,
    gradients,
    language_model_tokens,
    our_step,
    trained_parameters,
    twin,
)
from timing import Run, interleaved_medians
from torch import Tensor

from reporting.context import Context, Deadline
from reporting.models import DATASET, load, usable_weights, weights_name
from reporting.reasons import Skip, package_missing
from reporting.tables import plain, table, times

_AUTHORS_USERS = 8
_WORST_ERROR = {"float32": 1e-3, "bfloat16": 0.3}  # of a user's embedding; 32 layers in bfloat16 give 0.05 on average
_ROUNDS = 3

OURS = "ours"

Rows = list[dict[str, Any]]


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """Three comparisons, each with its own batch; the forms of a comparison run in turn."""
    shape = context.settings.waterfall[0]
    weights, left_out = usable_weights(context)
    found: dict[str, Rows] = {}
    for name, compare in COMPARISONS.items():
        if deadline.over:
            left_out.append(f"{name}: the time was over")
        elif name == "peft" and package_missing("peft"):
            left_out.append("peft: not installed")
        else:
            found[name] = compare(context, shape, weights[0], deadline)
            release()
    if not found:
        raise Skip("; ".join(left_out))
    kind = weights_name(weights[0], context.settings.dtype)
    return {"shape": shape, "weights": kind, "comparisons": found, "left_out": left_out}


def _step_shape(context: Context, users: int) -> StepShape:
    """The authors' M-Former beside a large model, the demonstration's beside a small one."""
    large = {"width": 768, "layers": 12, "heads": 12} if context.settings.paper_mformer else {}
    return StepShape(DATASET, users, **large)


def _padded(context: Context, shape: str, weights: str, deadline: Deadline) -> Rows:
    return _beside_padded(context, load(context, shape, weights, reads_tokens=True), deadline, PaddedStep, "mformer")


def _peft(context: Context, shape: str, weights: str, deadline: Deadline) -> Rows:
    from baselines.peft_prompt import PeftPromptStep

    return _beside_padded(context, load(context, shape, weights, reads_tokens=True), deadline, PeftPromptStep, "shared")


def _beside_padded(context: Context, frozen: Any, deadline: Deadline, form: type[PaddedStep], prefix: str) -> Rows:
    names = ("padded", "padded, every layer recomputed")

    def check(name: str, actual: Tensor, expected: Tensor) -> None:
        _check(name, actual, expected, context)

    found = padded_forms(form, frozen, _step_shape(context, context.settings.users), names, check, prefix=prefix)
    tokens = {OURS: found.useful} | dict.fromkeys(names, found.computed)
    return _compare(context, {OURS: our_step(found.model, found.batch), **found.forms}, tokens, deadline)


def _authors(context: Context, shape: str, weights: str, deadline: Deadline) -> Rows:
    """Their loss over lists of negatives: our method beside it, and the same sequences in our form."""
    frozen = load(context, shape, weights, reads_tokens=True)
    padded = twin(frozen)
    sizes = _step_shape(context, _AUTHORS_USERS)
    model = build_laser(frozen, sizes)
    form, work = AuthorsStep(model, padded), AuthorsWorkload(model, sizes)
    with torch.no_grad():
        _check("authors' form", form.encode(work.padded_users)[0], model.encode(work.users)[0], context)
    parameters, packed = trained_parameters(model), "the same sequences, packed"
    with counted_tokens(padded) as counts:
        form.whole_against_lists(work)
    runs: dict[str, Run] = {
        packed: lambda: gradients(work.whole_loss(model), parameters),
        "authors' form": lambda: gradients(form.whole_against_lists(work), form.parameters),
    }
    assert work.users.positives is not None
    tokens = {
        OURS: language_model_tokens(model, work.users, work.users.positives),
        packed: language_model_tokens(model, work.users, work.items),
        "authors' form": sum(counts),
    }
    return _compare(context, {OURS: our_step(model, work.users), **runs}, tokens, deadline)


def _check(name: str, actual: Tensor, expected: Tensor, context: Context) -> None:
    error = relative_error(actual, expected)
    if not error < _WORST_ERROR[context.settings.dtype]:
        raise RuntimeError(f"baselines: {name} must give our embeddings, got a row that is off by {error:.1e}")


def _compare(context: Context, runs: Mapping[str, Run], computed: Mapping[str, int], deadline: Deadline) -> Rows:
    start = perf_counter()
    runs = {name: run for name, run in runs.items() if _fits(run)}
    rounds = deadline.rounds(perf_counter() - start, _ROUNDS)
    if OURS not in runs:
        raise RuntimeError("baselines: our step must fit into memory, got none that does")
    seconds = interleaved_medians(runs, context.clock, 0.0, rounds)
    rows: Rows = []
    for name, tokens in computed.items():
        row: dict[str, Any] = {"form": name, "tokens": tokens}
        if name in seconds:
            row |= {"seconds": seconds[name], "ours_is_faster_by": seconds[name] / seconds[OURS]}
        rows.append(row)
    return rows


def _fits(run: Run) -> bool:
    """Whether it runs within the memory of the device."""
    try:
        run()
    except torch.OutOfMemoryError:
        release()
        return False
    return True


COMPARISONS = {"padded": _padded, "peft": _peft, "authors": _authors}  # each gives its rows, ours among them

_TITLES = {
    "padded": "users with a target each; the item matrix stands still, so nothing but the users is encoded",
    "peft": "the same with one learned prefix for everybody",
    "authors": f"{_AUTHORS_USERS} users, a label each and {NEGATIVES} negatives for every user. Ours encodes users and "
    "labels and scores against the whole item matrix; the packed line encodes all that the authors encode",
}


def markdown(found: Mapping[str, Any]) -> list[str]:
    """A table for every comparison."""
    lines = [f"Whole steps, forward and backward, around {found['shape']} in {found['weights']}."]
    for name, rows in found["comparisons"].items():
        cells = []
        for row in rows:
            time = plain(1e3 * row["seconds"]) if "seconds" in row else "out of memory"
            cells.append([row["form"], time, times(row.get("ours_is_faster_by")), f"{row['tokens']}"])
        head = ["form", "ms", "ours is faster by", "tokens in the model"]
        lines += ["", f"**{name.capitalize()}**: {_TITLES[name]}.", "", *table(head, cells)]
    return lines
