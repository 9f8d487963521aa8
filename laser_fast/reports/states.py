"""What the ID-based recommender's states are worth where it has seen the target and where it has not."""

from laser_fast.recommenders.state_spread import StateGap
from laser_fast.reports.document import Block, Heading, Paragraph, Table
from laser_fast.reports.run_record import RunRecord
from laser_fast.reports.subject import Subject

_SETS = {
    "in_sample": "training rows, full model (has seen the target)",
    "held_out": "training rows, the fold without the user",
    "valid": "validation rows, full model (as it serves)",
    "held_out_valid": "validation rows, the fold without the user",
}


def state_blocks(record: RunRecord, subject: Subject | None) -> list[Block]:
    """NDCG@10 and the spread of the states, in-sample, cross-fitted and as served; nothing where no state is read."""
    if subject is None or subject.model.recommender is None:
        return []
    blocks: list[Block] = [Heading("States that the prefix is written from")]
    gap: StateGap | None = getattr(subject.recommender, "gap", None)
    blocks.append(Paragraph(_which(record, subject)))
    if gap is None:
        text = "How good they are on training rows was not measured: the recommender's folder does not tell."
        return [*blocks, Paragraph(text, "note")]
    qualities = {name: getattr(gap, name) for name in _SETS}
    rows = tuple(
        (said, "-" if qualities[name] is None else f"{qualities[name]:.4f}", *_spread(gap, name))
        for name, said in _SETS.items()
        if qualities[name] is not None or name in gap.states
    )
    caption = (
        f"A sample of {gap.rows:,} training rows and all {len(subject.split.valid):,} validation rows; the whole "
        "catalogue is ranked. “alike”: mean cosine between the states of two rows; “to full”: mean cosine between a "
        "row's state and the full model's state of the same history."
    )
    header = ("states of", "NDCG@10", "length of a state", "alike", "to full")
    return [*blocks, Table(header, rows, caption)]


def _which(record: RunRecord, subject: Subject) -> str:
    setting = record.config.get("mformer", {}).get("states", "in-sample")  # a run from before there was a choice
    has_folds = getattr(subject.recommender, "cross_fitted", None) is not None
    if setting != "in-sample" and has_folds:
        return (
            "Training rows were read with the recommender's folds: each row's states are of a model that has not seen "
            "its user. All other histories are read with the whole recommender. The closer the second line is to the "
            "third, the less training differs from serving."
        )
    return (
        "Training rows were read with the whole recommender, which has seen their targets, so its states were better "
        "in training than they are in service, and the prefix learned to trust them too much by that."
    )


def _spread(gap: StateGap, name: str) -> tuple[str, str, str]:
    spread = gap.states.get(name)
    if spread is None:
        return "-", "-", "-"
    return f"{spread.norm:.2f} ± {spread.norm_deviation:.2f}", f"{spread.alike:.3f}", f"{spread.to_full:.3f}"
