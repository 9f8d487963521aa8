"""What a report says of the score's terms, of the states that the prefix is written from, and of what was trained."""

from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from laser_fast.config import BiTuningConfig
from laser_fast.recommenders.state_spread import StateGap, StateSpread
from laser_fast.reports.document import Block, Heading, Paragraph, Table
from laser_fast.reports.results_section import what_was_trained
from laser_fast.reports.setup_section import score_blocks, state_blocks
from laser_fast.reports.subject import RunRecord, Subject
from laser_fast.retrieval import Calibration

_SPREADS = {"in_sample": StateSpread(19.14, 0.5, 0.126, 1.0), "held_out": StateSpread(15.02, 0.49, 0.1446, 0.98)}
_GAP = StateGap(2000, 0.4473, 0.4152, 0.1119, 0.1111, _SPREADS)
_FEW_WEIGHTS = {"laser": 1.0, "rules": 0.34567}
_ALL_WEIGHTS = {"laser": 1.0, "recommender": 0.5, "rules": 2.0, "neighbors": 0.0}
SAID = {
    "mformer": "M-Former (4 experts, 2 for each user, 3 virtual tokens) writes what an ID-based recommender knows",
    "linear": "a linear map writes what an ID-based recommender knows about the user in front of the text",
    "shared": "one learned text of virtual tokens, the same for everybody, stands in front of the text",
    "none": "nothing stands in front of the text",
}


def record_with(**config: Any) -> RunRecord:
    return RunRecord("run", config, "", {}, (), 0, None, None)


def score_of(calibration: Calibration | None) -> list[Block]:
    scorer: Any = None if calibration is None else SimpleNamespace(calibration=calibration)
    return list(score_blocks(cast(Subject, SimpleNamespace(model=SimpleNamespace(calibration=scorer)))))


def states_of(gap: StateGap | None, *, states: str | None = "auto", folds: bool = True, read: bool = True) -> list[Any]:
    subject: Any = SimpleNamespace(
        model=SimpleNamespace(recommender=object() if read else None),
        recommender=SimpleNamespace(gap=gap, cross_fitted=object() if folds else None),
        split=SimpleNamespace(valid=range(3285)),
    )
    return list(state_blocks(record_with(mformer={} if states is None else {"states": states}), subject))


@pytest.mark.parametrize(
    ("fitted", "terms", "end"),
    [
        (
            Calibration(_FEW_WEIGHTS, (), -4.0, 2.5, 0.125),
            {"laser": "1", "rules": "0.346", "history bias": "-4", "last bias": "2.5", "popularity weight": "0.125"},
            "0 or left out (here: recommender, neighbors).",
        ),
        (
            Calibration(_ALL_WEIGHTS, ("recommender",)),
            {"laser": "1", "recommender": "0.5", "rules": "2", "neighbors": "0"}
            | dict.fromkeys(("history bias", "last bias", "popularity weight"), "0"),
            "is 0 or left out.",
        ),
    ],
)
def test_every_term_has_its_scalar_and_what_is_left_out_is_named(
    fitted: Calibration, terms: dict[str, str], end: str
) -> None:
    heading, said, table = score_of(fitted)
    assert isinstance(heading, Heading) and isinstance(said, Paragraph) and isinstance(table, Table)
    assert {row[0]: row[1] for row in table.rows} == terms and all(row[2] for row in table.rows)
    assert table.caption.endswith(end)


def test_a_cosine_has_no_terms() -> None:
    assert score_of(None) == []


def test_three_figures_and_the_spread_of_the_states() -> None:
    heading, said, table = states_of(_GAP)
    assert isinstance(heading, Heading)
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
    _, said, table = states_of(gap, states=states, folds=folds)
    assert "whole recommender, which has seen their targets" in said.text
    assert len(table.rows) == (4 if folds else 2)


def test_what_was_not_measured_is_said_and_what_is_not_read_is_not() -> None:
    assert "was not measured: the recommender's folder does not tell" in states_of(None)[-1].text
    assert states_of(_GAP, read=False) == []


@pytest.mark.parametrize("prefix", get_args(BiTuningConfig.model_fields["prefix"].annotation))
def test_every_writer_of_a_prefix_is_named(prefix: str) -> None:
    mformer = {"num_experts": 4, "top_k": 2, "num_queries": 3}
    record = record_with(lm={"path": "package:minilm/model"}, bituning={"prefix": prefix}, mformer=mformer)
    said = what_was_trained(record, None)
    assert said.startswith("Laser, a recommender around the frozen language model minilm; ")
    assert SAID[prefix] in said
