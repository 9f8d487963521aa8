"""Full ranking in chunks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.data import EvaluationRows, PackedSequences
from laser_fast.evaluation import evaluate, row_batches
from laser_fast.recommenders import Popularity, Scorer


class _NextItem:
    """Scores last + 1 highest, then last + 2, and so on around the catalogue."""

    num_items = 6

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        self.batches.append(cu_seqlens.numel() - 1)
        last = items[cu_seqlens[1:].long() - 1]
        return -((torch.arange(6) - last[:, None] - 1) % 6).float()


def _rows() -> EvaluationRows:
    histories = PackedSequences.from_lists([[0, 1], [5], [2, 2, 2], [3], [4, 0]])
    return EvaluationRows(np.arange(5), histories, np.array([2, 2, 3, 3, 1]))


def test_ranks_follow_the_rows() -> None:
    # after 1 comes 2: rank 1; after 5 come 0, 1, 2: rank 3; a repeat of the last item is the last of six
    assert evaluate(_NextItem(), _rows()).ranks.tolist() == [1, 3, 1, 6, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_chunks_change_nothing(batch_size: int) -> None:
    scorer = _NextItem()
    assert evaluate(scorer, _rows(), batch_size=batch_size).ranks.tolist() == [1, 3, 1, 6, 1]
    assert max(scorer.batches) <= batch_size
    assert sum(scorer.batches) == 5


def test_history_items_are_not_filtered() -> None:
    popularity = Popularity(torch.tensor([1, 2, 9, 3, 4, 5]))
    assert evaluate(popularity, _rows()).ranks.tolist() == [1, 1, 4, 4, 5]


def test_no_rows() -> None:
    rows = EvaluationRows(np.zeros(0, np.int64), PackedSequences.from_lists([]), np.zeros(0, np.int64))
    metrics = evaluate(_NextItem(), rows)
    assert len(metrics) == 0
    assert metrics.to_dict()["metrics"]["MRR"]["mean"] is None


def test_memory_mapped_rows_are_left_alone(tmp_path: pytest.TempPathFactory) -> None:
    rows = _rows()
    for array in (rows.histories.items, rows.targets):
        array.setflags(write=False)
    for items, _, targets in row_batches(rows, 2):
        items += 1
        targets += 1
    assert rows.histories.items.tolist() == [0, 1, 5, 2, 2, 2, 3, 4, 0]


def test_a_progress_bar_counts_rows(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(_NextItem(), _rows(), batch_size=2, progress=True)
    assert "5/5" in capsys.readouterr().err
    evaluate(_NextItem(), _rows(), batch_size=2)
    assert capsys.readouterr().err == ""


def test_a_wrong_shape_is_refused() -> None:
    class Narrow(_NextItem):
        def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
            return super().score(items, cu_seqlens)[:, :4]

    with pytest.raises(ValueError, match=r"score must return shape \(5, 6\), got \(5, 4\)"):
        evaluate(Narrow(), _rows())


def test_not_a_number_is_refused() -> None:
    class Broken(_NextItem):
        def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
            return super().score(items, cu_seqlens) * float("nan")

    with pytest.raises(ValueError, match="scores must not be NaN"):
        evaluate(Broken(), _rows())


def test_batch_size_is_checked() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(_NextItem(), _rows(), batch_size=0)


def test_protocol_is_what_is_needed() -> None:
    assert isinstance(_NextItem(), Scorer)
    assert not isinstance(object(), Scorer)
