"""The calibrated score against its formula."""

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.evaluation import target_ranks
from laser_fast.recommenders import Popularity, Scorer
from laser_fast.retrieval import CalibratedScorer, Calibration


class _Fixed:
    """The same scores for every history."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = torch.tensor(scores)
        self.num_items = len(scores)
        self.calls = 0

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        self.calls += 1
        return self.scores.expand(cu_seqlens.numel() - 1, -1)


_COUNTS = torch.tensor([0, 1, 3, 7])
_ITEMS = torch.tensor([2, 2, 1, 0])
_CU_SEQLENS = torch.tensor([0, 3, 3, 4], dtype=torch.int32)  # 2 2 1 | (empty) | 0


def test_formula_by_hand() -> None:
    calibration = Calibration(
        {"raw": 2.0, "z": 10.0}, standardize=("z",), history_bias=-100.0, last_bias=30.0, popularity_weight=0.5
    )
    components = {"raw": _Fixed([0.0, 1.0, 2.0, 3.0]), "z": _Fixed([5.0, 5.0, 7.0, 7.0])}
    scores = CalibratedScorer(components, calibration, _COUNTS).score(_ITEMS, _CU_SEQLENS)
    base = 2 * np.arange(4) + 10 * np.array([-1, -1, 1, 1]) + 0.5 * np.log(1 + _COUNTS.numpy())
    repeats = np.array([[0, -70, -100, 0], [0, 0, 0, 0], [-70, 0, 0, 0]])
    np.testing.assert_allclose(scores.numpy(), base + repeats, rtol=1e-6)


def test_equal_scores_have_no_z_score() -> None:
    calibration = Calibration({"z": 1.0}, standardize=("z",))
    scores = CalibratedScorer({"z": _Fixed([0.1, 0.1, 0.1, 0.1])}, calibration, _COUNTS).score(_ITEMS, _CU_SEQLENS)
    assert scores.tolist() == [[0, 0, 0, 0]] * 3


def test_components_are_left_alone_and_unused_ones_not_called() -> None:
    used, unused = _Fixed([0.0, 1.0, 2.0, 3.0]), _Fixed([0.0, 0.0, 0.0, 0.0])
    calibration = Calibration({"used": 1.0, "unused": 0.0}, history_bias=-5.0)
    scorer = CalibratedScorer({"used": used, "unused": unused}, calibration, _COUNTS)
    first = scorer.score(_ITEMS, _CU_SEQLENS)
    assert torch.equal(scorer.score(_ITEMS, _CU_SEQLENS), first)
    assert used.scores.tolist() == [0, 1, 2, 3]
    assert (used.calls, unused.calls) == (2, 0)


def test_no_rows_and_protocol() -> None:
    scorer = CalibratedScorer({"a": Popularity(_COUNTS)}, Calibration({"a": 1.0}, ("a",), -1.0, 2.0, 3.0), _COUNTS)
    assert isinstance(scorer, Scorer)
    scores = scorer.score(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
    assert scores.shape == (0, 4)
    assert target_ranks(scores, torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_names_and_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"standardize must name components, got \['b'\]; known: \['a'\]"):
        Calibration({"a": 1.0}, standardize=("b",))
    with pytest.raises(ValueError, match=r"weights and biases must be finite, got \{'last_bias': inf, 'a': nan\}"):
        Calibration({"a": float("nan"), "b": 1.0}, last_bias=float("inf"))
    with pytest.raises(ValueError, match=r"components must be those with a weight, got \['a'\] and \['b'\]"):
        CalibratedScorer({"a": Popularity(_COUNTS)}, Calibration({"b": 1.0}), _COUNTS)
    with pytest.raises(ValueError, match=r"must share a catalogue, got \{'a': 4\} and 3"):
        CalibratedScorer({"a": Popularity(_COUNTS)}, Calibration({"a": 1.0}), _COUNTS[:3])
