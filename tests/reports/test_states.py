"""The part of a report about the states that the prefix is written from, and the sentence where it does not know."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from laser_fast.recommenders.state_spread import StateGap, StateSpread
from laser_fast.reports.document import Block, Heading, Paragraph, Table
from laser_fast.reports.run_record import RunRecord
from laser_fast.reports.states import state_blocks
from laser_fast.reports.subject import Subject

_SPREADS = {"in_sample": StateSpread(19.14, 0.5, 0.126, 1.0), "held_out": StateSpread(15.02, 0.49, 0.1446, 0.98)}
_GAP = StateGap(2000, 0.4473, 0.4152, 0.1119, 0.1111, _SPREADS)


def blocks_of(
    gap: StateGap | None, *, states: str | None = "auto", folds: bool = True, read: bool = True
) -> list[Block]:
    recommender = SimpleNamespace(gap=gap, cross_fitted=object() if folds else None)
    subject: Any = SimpleNamespace(
        model=SimpleNamespace(recommender=object() if read else None),
        recommender=recommender,
        split=SimpleNamespace(valid=range(3285)),
    )
    record = SimpleNamespace(config={"mformer": {} if states is None else {"states": states}})
    return state_blocks(cast(RunRecord, record), cast(Subject, subject))


def test_three_figures_and_the_spread_of_the_states() -> None:
    heading, said, table = blocks_of(_GAP)
    assert isinstance(heading, Heading) and isinstance(said, Paragraph) and isinstance(table, Table)
    assert "each row's states are of a model that has not seen its user" in said.text
    assert [row[1:] for row in table.rows] == [
        ("0.4473", "19.14 ± 0.50", "0.126", "1.000"),
        ("0.4152", "15.02 ± 0.49", "0.145", "0.980"),
        ("0.1119", "-", "-", "-"),
        ("0.1111", "-", "-", "-"),
    ]
    assert "2,000 training rows and all 3,285 validation rows" in table.caption


@pytest.mark.parametrize(("states", "folds"), [("in-sample", True), ("auto", False), (None, True)])
def test_it_says_when_the_states_had_seen_the_targets(states: str | None, folds: bool) -> None:
    gap = _GAP if folds else StateGap(2000, 0.4473, None, 0.1119, None, {})
    _, said, table = blocks_of(gap, states=states, folds=folds)
    assert isinstance(said, Paragraph) and "whole recommender, which has seen their targets" in said.text
    assert isinstance(table, Table) and len(table.rows) == (4 if folds else 2)


def test_what_was_not_measured_is_said_and_what_is_not_read_is_not() -> None:
    last = blocks_of(None)[-1]
    assert isinstance(last, Paragraph) and "was not measured: the recommender's folder does not tell" in last.text
    assert blocks_of(_GAP, read=False) == [] == state_blocks(cast(RunRecord, None), None)
