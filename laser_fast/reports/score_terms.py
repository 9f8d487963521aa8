"""Which terms the calibrated score adds up, and with which scalars."""

from laser_fast.reports.document import Block, Heading, Paragraph, Table
from laser_fast.reports.subject import Subject

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


def score_blocks(subject: Subject | None) -> list[Block]:
    """The terms with their scalars; nothing where the score is the cosine alone."""
    if subject is None or subject.model.calibration is None:
        return []
    fitted = subject.model.calibration.calibration
    rows = [(name, f"{weight:.3g}", _COMPONENTS.get(name, "")) for name, weight in fitted.weights.items()]
    rows += [(name.replace("_", " "), f"{getattr(fitted, name):.3g}", said) for name, said in _SCALARS.items()]
    missing = [name for name in _COMPONENTS if name not in fitted.weights]
    caption = "Fitted on the validation rows; a term that their best NDCG@10 is reached without is 0 or left out"
    caption += f" (here: {', '.join(missing)})." if missing else "."
    said = Paragraph("An item's score is the sum of these terms. Their scales differ, so do not compare the scalars.")
    return [
        Heading("Calibrated score"),
        said,
        Table(("term", "scalar", "of what"), tuple(rows), caption, wide=frozenset({0, 2})),
    ]
