"""The part of a report that says what the calibrated score is made of."""

from types import SimpleNamespace
from typing import Any, cast

from laser_fast.reports.document import Heading, Paragraph, Table
from laser_fast.reports.score_terms import score_blocks
from laser_fast.reports.subject import Subject
from laser_fast.retrieval import Calibration


def subject_with(calibration: Calibration | None) -> Subject:
    scorer: Any = None if calibration is None else SimpleNamespace(calibration=calibration)
    return cast(Subject, SimpleNamespace(model=SimpleNamespace(calibration=scorer)))


def test_every_term_has_its_scalar_and_what_is_left_out_is_named() -> None:
    fitted = Calibration({"laser": 1.0, "rules": 0.34567}, (), -4.0, 2.5, 0.125)
    heading, said, table = score_blocks(subject_with(fitted))
    assert isinstance(heading, Heading) and isinstance(said, Paragraph) and isinstance(table, Table)
    assert [row[:2] for row in table.rows] == [
        ("laser", "1"),
        ("rules", "0.346"),
        ("history bias", "-4"),
        ("last bias", "2.5"),
        ("popularity weight", "0.125"),
    ]
    assert all(row[2] for row in table.rows)
    assert table.caption.endswith("0 or left out (here: recommender, neighbors).")


def test_nothing_is_named_where_nothing_is_left_out() -> None:
    weights = {"laser": 1.0, "recommender": 0.5, "rules": 2.0, "neighbors": 0.0}
    *_, table = score_blocks(subject_with(Calibration(weights, ("recommender",))))
    assert isinstance(table, Table) and table.caption.endswith("is 0 or left out.")
    assert table.rows[3][:2] == ("neighbors", "0")


def test_a_cosine_has_no_terms() -> None:
    assert score_blocks(subject_with(None)) == [] == score_blocks(None)
