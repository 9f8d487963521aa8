"""How the training went: losses of each stage, validation of each epoch, speed."""

from collections.abc import Iterator, Sequence

from laser_fast.reports.document import Block, Paragraph, Picture, Table
from laser_fast.reports.plots import Line, bars, curves, over_epochs
from laser_fast.reports.subject import Epoch, RunRecord, stage_name

_METRIC = "validation_NDCG@10"
_NO_LOSSES = {"step", "epoch", "time_s", "text_tokens_per_s", "micro_batches", "learning_rate", "balance"}
_NO_LOSSES |= {"peak_allocated_bytes", "peak_reserved_bytes", "terms"}  # terms: the loss without the balance
_MEANINGS = {"loss": "all terms together", "cross_entropy": "against the catalogue"}
_TITLES = {"text": "Text stage", "pretrain": "Stage 1", "phase_a": "Stage 2, phase A", "phase_b": "Stage 2, phase B"}
_BEFORE_THE_LM = ("text", "pretrain")
_EXPLAINED = {
    "text": "the text residual alone learns which texts follow which, from vectors that were computed once.",
    "pretrain": "M-Former alone learns to say in its virtual tokens what the text of the same history says.",
    "phase_a": "users are trained against the catalogue, whose vectors are encoded anew for every epoch; its loss has "
    "a further term among the items of a batch, where that is switched on.",
    "phase_a, items from texts": "users are trained against the catalogue, whose vectors the text residual makes anew "
    "in every step.",
    "phase_b": "the catalogue's vectors stay as they were at the best epoch; only the users' side goes on.",
}


def training_blocks(record: RunRecord) -> Iterator[Block]:
    """A curve for every stage, or a sentence where the log has no line of it."""
    if any("step" in epoch.values for epoch in record.epochs):
        yield Paragraph(
            "Each point is the mean over one epoch, drawn at its last step; lower is better. Losses are in nats."
        )
    else:
        yield Paragraph("The log holds no finished epoch, so there is no curve to show.", "note")
    for stage, title in _TITLES.items():
        epochs = [epoch for epoch in record.of_stage(stage) if "step" in epoch.values]
        if epochs:
            yield _losses(stage, title, epochs, record.items_are_texts)
        elif record.epochs and stage != "text":  # most runs have no text stage, and need not say so
            yield Paragraph(f"{title}: this run has no epoch of it.", "note")
    if measured := [epoch for epoch in record.epochs if _METRIC in epoch.values]:
        yield _validation(record, measured)
    if timed := [epoch for epoch in record.epochs if "text_tokens_per_s" in epoch.values]:
        yield _speed([epoch for epoch in timed if epoch.stage not in _BEFORE_THE_LM] or timed)
        yield _table(record)
    if record.shortages:
        yield Paragraph(f"Memory ran out {record.shortages} times; the batches went through in smaller parts.", "note")


def loss_terms(epochs: Sequence[Epoch]) -> list[str]:
    """Names of the losses of training steps in the log, "loss" first, then as they appear; without the balance, which
    has another scale."""
    names = [
        name
        for epoch in epochs
        for name, value in epoch.values.items()
        if isinstance(value, float | int) and not isinstance(value, bool) and name not in _NO_LOSSES
        if not name.startswith("validation_") and "accuracy" not in name
    ]
    return sorted(dict.fromkeys(names), key=lambda name: name != "loss")


def _losses(stage: str, title: str, epochs: list[Epoch], items_are_texts: bool) -> Picture:
    lines = []
    for name in loss_terms(epochs):
        at = [epoch for epoch in epochs if name in epoch.values]
        judged = "validation_terms" if name == "loss" else f"validation_{name}"
        validation = [epoch.values[judged] for epoch in at if judged in epoch.values]
        steps, values = ([epoch.values[key] for epoch in at] for key in ("step", name))
        meaning = _MEANINGS.get(name, name.replace("_", " "))
        lines.append(Line(meaning, steps, values, validation if len(validation) == len(at) else None))
    first, last = epochs[0].values["loss"], epochs[-1].values["loss"]
    course = f"from {first:.3f} to {last:.3f}" if len(epochs) > 1 else f"{first:.3f}; a single epoch, so a single point"
    dashed = " Dashed: on the validation users." if any(line.validation is not None for line in lines) else ""
    explained = _EXPLAINED["phase_a, items from texts" if items_are_texts and stage == "phase_a" else stage]
    caption = f"{title}: {explained} Loss {course}.{dashed}"
    svg = curves(lines, f"training steps of {stage_name(stage)}", "loss (nats)")
    return Picture(f"loss-{stage.replace('_', '-')}", svg, f"{title}: loss over training steps", caption)


def _validation(record: RunRecord, epochs: list[Epoch]) -> Picture:
    kept = next((place for place, epoch in enumerate(epochs) if record.is_kept(epoch)), None)
    values = [epoch.values[_METRIC] for epoch in epochs]
    svg = over_epochs([epoch.short for epoch in epochs], [("", values)], "NDCG@10, validation", marked=kept)
    ring = "" if kept is None else f" Ringed: the model kept, {epochs[kept].short}."
    caption = f"Validation after each epoch of stage 2 (A0: before its first step; A, B: its phases).{ring}"
    return Picture("validation", svg, "Validation NDCG@10 per epoch", caption)


def _speed(epochs: list[Epoch]) -> Picture:
    values = [epoch.values["text_tokens_per_s"] for epoch in epochs]
    svg = bars([epoch.short for epoch in epochs], values, "text tokens per second")
    early = epochs[0].stage in _BEFORE_THE_LM
    what = "before stage 2, without the language model" if early else "stage 2"
    caption = f"Speed of the training steps: {min(values):,.0f} to {max(values):,.0f} text tokens per second ({what})."
    return Picture("speed", svg, "Text tokens per second, per epoch", caption)


def _table(record: RunRecord) -> Table:
    columns = (
        ("steps so far", "step", ",d"),
        ("loss", "loss", ".4f"),
        ("balance", "balance", ".3f"),
        ("NDCG@10, validation", _METRIC, ".4f"),
        ("seconds", "time_s", ",.1f"),
        ("text tokens/s", "text_tokens_per_s", ",.0f"),
    )
    rows, kept = [], set()
    for place, epoch in enumerate(record.epochs):
        values = [(epoch.values.get(name), form) for _, name, form in columns]
        kept |= {place} if record.is_kept(epoch) else set()
        label = f"{epoch.short} (kept)" if place in kept else epoch.short
        rows.append((label, *("-" if value is None else format(value, form) for value, form in values)))
    text = "T: the text stage, " if record.of_stage("text") else ""
    caption = f"{text}P: stage 1, A and B: the phases of stage 2. Seconds are those of the training steps alone."
    return Table(("epoch", *(title for title, _, _ in columns)), tuple(rows), caption, strong=frozenset(kept))
