"""The search finds what was planted, and nothing where nothing is."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.data import EvaluationRows, PackedSequences
from laser_fast.evaluation import calibration_fit as calibration
from laser_fast.evaluation import evaluate
from laser_fast.recommenders import Scorer
from laser_fast.retrieval import CalibratedScorer

_NUM_ITEMS = 40


class _Table:
    """Fixed random scores for each last item."""

    num_items = _NUM_ITEMS

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.table[items[cu_seqlens[1:].long() - 1]].clone()


def _noise(seed: int) -> Tensor:
    return torch.randn(_NUM_ITEMS, _NUM_ITEMS, generator=torch.Generator().manual_seed(seed))


def _rows(targets_of: Tensor, count: int = 200) -> EvaluationRows:
    """Histories of two items; the target is the largest entry of `targets_of` in the row of the last one."""
    histories = np.random.default_rng(0).integers(0, _NUM_ITEMS, (count, 2))
    targets = targets_of[torch.from_numpy(histories[:, 1])].argmax(dim=1).numpy()
    return EvaluationRows(np.arange(count), PackedSequences.from_lists(histories.tolist()), targets)


def fitted_scorer(
    components: Mapping[str, Scorer], rows: EvaluationRows, counts: Tensor, **options: Any
) -> CalibratedScorer:
    return calibration.fit_calibration(components, rows, counts, **options)[0]


def _quality(scorer: CalibratedScorer | _Table, rows: EvaluationRows) -> float:
    return evaluate(scorer, rows)["NDCG@10"].mean


@pytest.mark.parametrize("standardize", [(), ("b",)])
def test_two_halves_of_the_truth_are_fused(standardize: tuple[str, ...]) -> None:
    first, second = _noise(1), _noise(2)
    rows = _rows(first + second)
    scale = 10 ** torch.linspace(-3, 3, _NUM_ITEMS)[:, None]  # every history has a scale of its own
    components = {"a": _Table(first), "b": _Table(scale * second + 7 * scale if standardize else 100 * second)}
    fitted, quality = calibration.fit_calibration(components, rows, torch.ones(_NUM_ITEMS), standardize=standardize)
    assert quality == pytest.approx(_quality(fitted, rows), abs=1e-3)  # float32 sums in another order
    assert quality > 0.95 and _quality(_Table(first), rows) < 0.8
    assert fitted.calibration.standardize == standardize
    if not standardize:
        weights = fitted.calibration.weights
        assert weights["b"] / weights["a"] == pytest.approx(0.01, rel=0.5)


def test_repeats_are_pushed_down() -> None:
    scores = _noise(3)
    truth = scores.clone()
    scores.fill_diagonal_(50.0)  # every item is its own best neighbour and never the answer
    truth.fill_diagonal_(-50.0)
    rows = _rows(truth)
    fitted = fitted_scorer({"a": _Table(scores)}, rows, torch.ones(_NUM_ITEMS))
    assert _quality(_Table(scores), rows) < 0.7
    assert _quality(fitted, rows) > 0.9
    assert fitted.calibration.history_bias + fitted.calibration.last_bias < -40


def test_a_planted_popularity_is_found() -> None:
    counts = torch.arange(_NUM_ITEMS) ** 2
    scores = _noise(4)
    rows = _rows(scores + 0.5 * torch.log1p(counts))
    fitted = fitted_scorer({"a": _Table(scores)}, rows, counts)
    assert fitted.calibration.popularity_weight == pytest.approx(0.5, rel=0.5)
    assert _quality(fitted, rows) > _quality(_Table(scores), rows) + 0.1


def test_what_has_no_use_gets_no_weight() -> None:
    scores = _noise(5)
    rows, counts = _rows(scores), torch.arange(_NUM_ITEMS)
    components = {"a": _Table(scores + _noise(7)), "against": _Table(-scores)}
    assert fitted_scorer(components, rows, counts).calibration.weights == {"a": 1.0, "against": 0.0}
    found = fitted_scorer({"a": _Table(scores), "noise": _Table(_noise(6))}, rows, counts).calibration
    assert found.weights["noise"] == 0
    assert (found.history_bias, found.last_bias, found.popularity_weight) == (0, 0, 0)
    components = {"noise": _Table(_noise(8)), "b": _Table(scores)}  # the first one can be left out as well
    fitted = fitted_scorer(components, rows, torch.ones(_NUM_ITEMS))
    assert fitted.calibration.weights["noise"] == 0 and fitted.calibration.weights["b"] > 0
    assert _quality(fitted, rows) == 1


def test_the_search_begins_where_the_targets_are_most_likely() -> None:
    first, second, counts = _noise(1), _noise(2), torch.arange(_NUM_ITEMS)
    rows = _rows(first + 0.5 * second + _noise(9))
    terms = calibration._Terms({"a": _Table(first), "b": _Table(3 * second)}, (), rows, counts, 64, "cpu", False)
    values = calibration._likeliest(terms, ["a", "b", "popularity_weight"])
    free = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in values.items()}
    chunk = np.arange(len(rows))
    scores = torch.stack([value * terms._term(name, chunk).double() for name, value in free.items()]).sum(dim=0)
    ridge = 0.5 * calibration._RIDGE * torch.stack(list(free.values())).square().sum()
    loss = torch.nn.functional.cross_entropy(scores, terms.targets) + ridge
    loss.backward()
    found, gradient = terms.cross_entropy(np.array(list(values.values())))
    assert found == pytest.approx(loss.item(), abs=1e-12)
    assert gradient.tolist() == pytest.approx([value.grad.item() for value in free.values() if value.grad is not None])
    assert values["a"] > 0.1 and values["b"] > 0.1
    for name, slope in zip(values, gradient.tolist(), strict=True):  # at the maximum; one held at 0 would go below it
        assert abs(slope) < 1e-6 or (values[name] == 0 and slope > 0 and name == "popularity_weight")


@pytest.mark.parametrize("spike", [3.0, 30.0, 300.0])
def test_a_component_that_says_little_and_that_loudly_is_not_lost(spike: float) -> None:
    """Newton's method runs in circles here, and a circle may end where the component seems to mislead."""
    first, second = _noise(5), _noise(6)
    told = second >= second.topk(8, dim=1).values[:, -1:]
    rows = _rows(first + told * 2.0)
    components = {"a": _Table(first), "b": _Table(torch.where(told, second.exp() * spike, 0.0))}
    terms = calibration._Terms(components, (), rows, torch.ones(_NUM_ITEMS), 64, "cpu", False)
    found = np.array(list(calibration._likeliest(terms, ["a", "b"]).values()))
    loss, gradient = terms.cross_entropy(found)
    assert np.abs(gradient).max() < 1e-6
    for change in (-0.1, 0.1):  # the lowest point, not one that is merely flat
        assert all(terms.cross_entropy(found + change * direction)[0] > loss for direction in np.eye(5)[:4])
    fitted = fitted_scorer(components, rows, torch.ones(_NUM_ITEMS))
    assert fitted.calibration.weights["b"] > 0
    assert _quality(fitted, rows) > _quality(_Table(first), rows) + 0.05


def test_the_fit_is_deterministic_and_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _noise(1), _noise(2)
    rows, counts = _rows(first + second, 100), torch.ones(_NUM_ITEMS)
    components = {"a": _Table(first), "b": _Table(second)}
    fits = [fitted_scorer(components, rows, counts, batch_size=size).calibration for size in (7, 200)]
    assert fits[0] == fits[1]
    monkeypatch.setattr(calibration, "_SCORES_PER_CHUNK", 30 * _NUM_ITEMS)
    assert fitted_scorer(components, rows, counts).calibration.weights == pytest.approx(fits[0].weights, rel=1e-4)


def test_many_rows_are_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_MAX_SCORES", 50 * _NUM_ITEMS)
    seen: list[int] = []

    class Watched(_Table):
        def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
            seen.extend(items.tolist())
            return super().score(items, cu_seqlens)

    scores = _noise(5)
    rows = _rows(scores)
    fitted_scorer({"a": Watched(scores)}, rows, torch.ones(_NUM_ITEMS))
    every = np.linspace(0, 199, 50).round().astype(np.int64)
    assert seen == rows.select(every).histories.items.tolist()


def test_what_cannot_be_fitted_is_refused() -> None:
    scores = _noise(5)
    rows, counts = _rows(scores), torch.ones(_NUM_ITEMS)
    with pytest.raises(ValueError, match="rows must not be empty, got 0 rows"):
        fitted_scorer({"a": _Table(scores)}, rows.select([]), counts)
    with pytest.raises(ValueError, match=r"components must not be called like a term, got \['last_bias'\]"):
        fitted_scorer({"last_bias": _Table(scores)}, rows, counts)
    with pytest.raises(ValueError, match="scores must be finite, got nan from component 'a'"):
        fitted_scorer({"a": _Table(scores * float("nan"))}, rows, counts)
    with pytest.raises(ValueError, match="components must be those with a weight"):
        fitted_scorer({}, rows, counts)
