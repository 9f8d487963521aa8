"""Full ranking in chunks."""

from typing import Any

import numpy as np
import pytest
import torch

from laser_fast.data import EvaluationRows, PackedSequences
from laser_fast.evaluation.evaluate import evaluate, row_batches
from laser_fast.recommenders import Popularity, Scorer

# after item 1 comes 2, then 3, and so on around six items; `_LAST` are the last items of `_rows`
_LAST = torch.tensor([1, 5, 2, 3, 0])
_SCORES = -((torch.arange(6) - _LAST[:, None] - 1) % 6).float()


def _rows() -> EvaluationRows:
    histories = PackedSequences.from_lists([[0, 1], [5], [2, 2, 2], [3], [4, 0]])
    return EvaluationRows(np.arange(5), histories, np.array([2, 2, 3, 3, 1]))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_ranks_follow_the_rows_whatever_the_chunks(
    batch_size: int, fixed_scores: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = fixed_scores(_SCORES)
    assert isinstance(scorer, Scorer) and not isinstance(object(), Scorer)
    assert evaluate(scorer, _rows(), batch_size=batch_size, progress=True).ranks.tolist() == [1, 3, 1, 6, 1]
    assert max(scorer.batches) <= batch_size and sum(scorer.batches) == 5
    assert "5/5" in capsys.readouterr().err
    evaluate(fixed_scores(_SCORES), _rows(), batch_size=batch_size)
    assert capsys.readouterr().err == ""


def test_history_items_are_not_filtered() -> None:
    popularity = Popularity(torch.tensor([1, 2, 9, 3, 4, 5]))
    assert evaluate(popularity, _rows()).ranks.tolist() == [1, 1, 4, 4, 5]


def test_no_rows(fixed_scores: Any) -> None:
    metrics = evaluate(fixed_scores(_SCORES), _rows().select([]))
    assert len(metrics) == 0 and metrics.to_dict()["metrics"]["MRR"]["mean"] is None


def test_memory_mapped_rows_are_left_alone() -> None:
    rows = _rows()
    for array in (rows.histories.items, rows.targets):
        array.setflags(write=False)
    for items, _, targets in row_batches(rows, 2):
        items += 1
        targets += 1
    assert rows.histories.items.tolist() == [0, 1, 5, 2, 2, 2, 3, 4, 0]


def test_broken_scores_and_batch_sizes_are_refused(fixed_scores: Any) -> None:
    narrow = fixed_scores(_SCORES[:, :4])
    narrow.num_items = 6
    with pytest.raises(ValueError, match=r"evaluate: score must return shape \(5, 6\), got \(5, 4\)"):
        evaluate(narrow, _rows())
    with pytest.raises(ValueError, match="scores must not be NaN"):
        evaluate(fixed_scores(_SCORES * float("nan")), _rows())
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(fixed_scores(_SCORES), _rows(), batch_size=0)
