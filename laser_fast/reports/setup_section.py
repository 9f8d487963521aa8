"""What a reader needs to do the run again: data, split, score, the recommender's states, environment, configuration."""

from collections.abc import Iterable, Iterator
from typing import Any

from laser_fast.recommenders.state_spread import StateGap
from laser_fast.reports.document import Block, Heading, Listing, Paragraph, Table
from laser_fast.reports.subject import RunRecord, Subject

_COMPONENTS = {
    "laser": "cosine of user and item embedding, over the temperature",
    "recommender": "score of the ID-based recommender, z-scored over the catalogue for each history",
    "rules": "sequential rules: which item followed which in training",
    "neighbors": "item neighbours: which items belong to the same histories",
}
_SCALARS = {
    "history_bias": "for an item of the history",
    "last_bias": "for its newest item, on top",
    "popularity_weight": "of log(1 + events of the item in training)",
}
_STATES = {
    "in_sample": "training rows, full model (has seen the target)",
    "held_out": "training rows, the fold without the user",
    "valid": "validation rows, full model (as it serves)",
    "held_out_valid": "validation rows, the fold without the user",
}


def setup_blocks(record: RunRecord, subject: Subject | None) -> Iterator[Block]:
    """What was recorded of the run."""
    yield Heading("Data")
    if subject is None:
        yield Paragraph("The data set was not read, as there is no model to measure on it.", "note")
    else:
        yield _facts(_data(subject))
        yield from score_blocks(subject)
        yield from state_blocks(record, subject)
    yield Heading("Environment of the training")
    environment = dict(record.environment)
    if environment:
        versions = environment.pop("versions", {})
        commit = environment.pop("commit", None) or "not known (installed package)"
        finished = record.finished or "no"
        yield _facts([("commit", commit), *environment.items(), *sorted(versions.items()), ("finished", finished)])
    else:
        yield Paragraph("The run has no environment.json.", "note")
    yield Heading("Effective configuration")
    yield Listing(record.config_text)


def _data(subject: Subject) -> Iterator[tuple[str, Any]]:
    manifest, split = subject.dataset.manifest, subject.split
    yield "format", manifest.format
    yield from (("source", f"{source.name}, SHA-256 {source.sha256[:16]}…") for source in manifest.sources)
    yield from ((name.replace("_", " "), f"{count:,}") for name, count in sorted(manifest.counts.items()))
    yield from ((name.replace("_", " "), value) for name, value in sorted(manifest.filters.items()))
    yield "tie rule", manifest.tie_rule
    yield "split", split.rule
    yield "split hash", split.hash
    yield "data set hash", manifest.dataset_hash
    sizes = f"{len(split.train.items):,} events / {len(split.valid):,} users / {len(split.test):,} users"
    yield "training / validation / test rows", sizes


def _facts(facts: Iterable[tuple[str, Any]]) -> Table:
    rows = tuple((name, "-" if value is None else str(value)) for name, value in facts)
    return Table(("", ""), rows, wide=frozenset({0, 1}))


def score_blocks(subject: Subject) -> Iterator[Block]:
    """The terms of the calibrated score with their scalars; nothing where the score is the cosine alone."""
    if subject.model.calibration is None:
        return
    fitted = subject.model.calibration.calibration
    rows = [(name, f"{weight:.3g}", _COMPONENTS.get(name, "")) for name, weight in fitted.weights.items()]
    rows += [(name.replace("_", " "), f"{getattr(fitted, name):.3g}", said) for name, said in _SCALARS.items()]
    missing = [name for name in _COMPONENTS if name not in fitted.weights]
    caption = "Fitted on the validation rows; a term that their best NDCG@10 is reached without is 0 or left out"
    caption += f" (here: {', '.join(missing)})." if missing else "."
    yield Heading("Calibrated score")
    yield Paragraph("An item's score is the sum of these terms. Their scales differ, so do not compare the scalars.")
    yield Table(("term", "scalar", "of what"), tuple(rows), caption, wide=frozenset({0, 2}))


def state_blocks(record: RunRecord, subject: Subject) -> Iterator[Block]:
    """Quality and spread of the recommender's states in training and as served; nothing where no state is read."""
    if subject.model.recommender is None:
        return
    yield Heading("States that the prefix is written from")
    setting = record.config.get("mformer", {}).get("states", "in-sample")  # a run from before there was a choice
    if setting != "in-sample" and getattr(subject.recommender, "cross_fitted", None) is not None:
        yield Paragraph(
            "Training rows were read with the recommender's folds: each row's states are of a model that has not seen "
            "its user. All other histories are read with the whole recommender. The closer the second line is to the "
            "third, the less training differs from serving."
        )
    else:
        yield Paragraph(
            "Training rows were read with the whole recommender, which has seen their targets, so its states were "
            "better in training than they are in service, and the prefix learned to trust them too much by that."
        )
    gap: StateGap | None = getattr(subject.recommender, "gap", None)
    if gap is None:
        text = "How good they are on training rows was not measured: the recommender's folder does not tell."
        yield Paragraph(text, "note")
        return
    rows = []
    for name, said in _STATES.items():
        quality, spread = getattr(gap, name), gap.states.get(name)
        if quality is None and spread is None:
            continue
        cells = ("-", "-", "-")
        if spread is not None:
            length = f"{spread.norm:.2f} ± {spread.norm_deviation:.2f}"
            cells = (length, f"{spread.alike:.3f}", f"{spread.to_full:.3f}")
        rows.append((said, "-" if quality is None else f"{quality:.4f}", *cells))
    caption = (
        f"A sample of {gap.rows:,} training rows and all {len(subject.split.valid):,} validation rows; the whole "
        "catalogue is ranked. “alike”: mean cosine between the states of two rows; “to full”: mean cosine between a "
        "row's state and the full model's state of the same history."
    )
    yield Table(("states of", "NDCG@10", "length of a state", "alike", "to full"), tuple(rows), caption)
