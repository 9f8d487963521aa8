"""Counting baselines against tables worked out by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.recommenders import ItemKNN, Markov1, Popularity, Scorer, SequentialRules, item_to_item

Pack = Callable[..., tuple[Tensor, Tensor]]
# sequences 0 1 2 | 0 1 | 3 0 1 0 | (empty); catalogue of 5, item 4 unseen
_ITEMS = torch.tensor([0, 1, 2, 0, 1, 3, 0, 1, 0])
_CU_SEQLENS = torch.tensor([0, 3, 5, 9, 9], dtype=torch.int32)
_COUNTS = [4, 3, 1, 1, 0]


def _histories(count: int, num_items: int, longest: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, num_items, generator.integers(0, longest)).tolist() for _ in range(count)]


def _added_up(table: np.ndarray, decay: float, histories: list[list[int]]) -> np.ndarray:
    """sum_k decay^k * table[h_k], h_0 the newest history item."""
    nothing = np.zeros(len(table))
    return np.stack([sum((decay**age * table[i] for age, i in enumerate(h[::-1])), nothing) for h in histories])


def test_popularity_counts_events(pack: Pack) -> None:
    scores = Popularity.fit(_ITEMS, _CU_SEQLENS, 5).score(*pack([2], [], [0, 1]))
    assert scores.tolist() == [_COUNTS] * 3


def test_markov_counts_transitions_and_breaks_ties_by_popularity(pack: Pack) -> None:
    scores = Markov1.fit(_ITEMS, _CU_SEQLENS, 5).score(*pack([3, 0], [1], [2], []))
    transitions = np.array([[0, 3, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_allclose(scores.numpy(), transitions + np.array(_COUNTS) / 5, rtol=1e-6)
    scores = Markov1.fit(*pack([0], [1]), 3).score(*pack([0]))  # no transition across users
    np.testing.assert_allclose(scores[0].numpy(), np.array([1, 1, 0]) / 2, rtol=1e-6)


def test_knn_by_hand(pack: Pack) -> None:
    # sequences with the item: 0 in 3, 1 in 3, 2 in 1, 3 in 1; together: 01 in 3, 02 in 1, 12 in 1, 03 in 1, 13 in 1
    similar = np.zeros((5, 5))
    for a, b, together, size in [(0, 1, 3, 9), (0, 2, 1, 3), (1, 2, 1, 3), (0, 3, 1, 3), (1, 3, 1, 3)]:
        similar[a, b] = similar[b, a] = together / (math.sqrt(size) + 20)
    histories = [[2, 0, 1], [], [1, 1], [4]]
    scores = ItemKNN.fit(_ITEMS, _CU_SEQLENS, 5).score(*pack(*histories))
    np.testing.assert_allclose(scores.numpy(), _added_up(similar, 0.8, histories), rtol=1e-6)
    # of one neighbour each; item 2 is tied between 0 and 1 and item 3 as well: the lower index wins
    scores = ItemKNN.fit(_ITEMS, _CU_SEQLENS, 5, max_neighbors=1, shrinkage=0.0).score(*pack([0], [2], [3]))
    other = 1 / math.sqrt(3)
    np.testing.assert_allclose(scores.numpy(), [[0, 1, 0, 0, 0], [other, 0, 0, 0, 0], [other, 0, 0, 0, 0]], rtol=1e-6)
    long, short = ItemKNN.fit(_ITEMS, _CU_SEQLENS, 5, max_history=2).score(*pack([2, 0, 1], [0, 1]))
    assert torch.equal(long, short)


@pytest.mark.parametrize("items", [7, 4096])
def test_knn_equals_dense_arithmetic_on_random_data(monkeypatch: pytest.MonkeyPatch, items: int, pack: Pack) -> None:
    histories = _histories(200, 30, 9, seed=3)
    seen = np.zeros((200, 30))
    for row, history in enumerate(histories):
        seen[row, history] = 1
    counts = seen.sum(0)
    similar = seen.T @ seen / (np.sqrt(np.outer(counts, counts)) + 20)
    np.fill_diagonal(similar, 0)
    monkeypatch.setattr(item_to_item, "_ITEMS_PER_BLOCK", items)
    scores = ItemKNN.fit(*pack(*histories), 30).score(*pack(*histories))
    np.testing.assert_allclose(scores.numpy(), _added_up(similar, 0.8, histories), atol=1e-6)


def test_rules_by_hand(pack: Pack) -> None:
    # what follows a 0: 1 (three times at once), 2 (after 2), 0 (after 2); a 1: 2 at once, 0 at once; a 3: 0, 1, 0
    rules = np.zeros((5, 5))
    rules[0, 1], rules[0, 2], rules[0, 0] = 3, 1 / 2, 1 / 2
    rules[1, 2] = rules[1, 0] = 1
    rules[3, 0], rules[3, 1] = 1 + 1 / 3, 1 / 2
    histories = [[2, 0, 1], [], [0, 0], [3]]
    scores = SequentialRules.fit(_ITEMS, _CU_SEQLENS, 5).score(*pack(*histories))
    np.testing.assert_allclose(scores.numpy(), _added_up(np.log1p(rules), 0.5, histories), rtol=1e-6)
    only_next = SequentialRules.fit(_ITEMS, _CU_SEQLENS, 5, max_gap=1, max_history=1).score(*pack([3, 0]))
    np.testing.assert_allclose(only_next.numpy(), [np.log1p([0, 3, 0, 0, 0])], rtol=1e-6)
    strongest = SequentialRules.fit(_ITEMS, _CU_SEQLENS, 5, max_neighbors=1).score(*pack([0], [1]))
    expected = np.log1p([[0, 3, 0, 0, 0], [1, 0, 0, 0, 0]])  # of 1's two rules, equally strong, that of the lower item
    np.testing.assert_allclose(strongest.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("events", [1, 7, 10**9])
def test_rules_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch, events: int, pack: Pack) -> None:
    histories = _histories(40, 12, 15, seed=4)
    counts = np.zeros((14, 14))  # two items nobody has seen
    for history in histories:
        for place, item in enumerate(history):
            for gap, later in enumerate(history[place + 1 : place + 5], start=1):
                counts[item, later] += 1 / gap
    monkeypatch.setattr(item_to_item, "_EVENTS_PER_BLOCK", events)
    fitted = SequentialRules.fit(*pack(*histories), 14, max_gap=4, decay=0.9, max_history=20)
    expected = _added_up(np.log1p(counts), 0.9, histories)
    np.testing.assert_allclose(fitted.score(*pack(*histories)).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [ItemKNN, SequentialRules])
def test_sparse_scores_are_the_scores(kind: Any, pack: Pack) -> None:
    fitted, histories = kind.fit(_ITEMS, _CU_SEQLENS, 5), pack([2, 0, 1], [], [4], [0, 0], [3])
    places, values = fitted.sparse_score(*histories)
    assert bool((places.diff() > 0).all())
    dense = torch.zeros(5 * 5).index_put((places,), values).view(5, 5)
    torch.testing.assert_close(dense, fitted.score(*histories))
    assert (dense != 0).sum() == len(places)


@pytest.mark.parametrize("kind", [Popularity, Markov1, ItemKNN, SequentialRules])
def test_edges(kind: Any, pack: Pack) -> None:
    fitted = kind.fit(_ITEMS.numpy(), _CU_SEQLENS.numpy(), 5)
    assert isinstance(fitted, Scorer)
    assert fitted.score(*pack()).shape == (0, 5)
    scores = fitted.score(*pack([0, 1, 2, 3, 4], [], [4]))
    assert scores.shape == (3, 5) and scores.dtype == torch.float32 and torch.isfinite(scores).all()
    before = scores.clone()
    scores.add_(7)  # does no harm to the next ones
    assert torch.equal(fitted.score(*pack([0, 1, 2, 3, 4], [], [4])), before)
    nothing = kind.fit(*pack([], []), 3)
    assert nothing.score(*pack([1], [])).tolist() == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.score: items must be in 0\.\.4, got 5"):
        fitted.score(*pack([5]))
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.fit: items must be in 0\.\.2, got 4"):
        kind.fit(*pack([1, 4]), 3)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ItemKNN, {"shrinkage": -1.0}, r"ItemKNN\.fit: shrinkage must be at least 0, got -1\.0"),
        (ItemKNN, {"max_neighbors": 0}, r"ItemKNN\.fit: max_neighbors must be at least 1, got 0"),
        (SequentialRules, {"decay": 1.5}, r"decay must be in 0\.\.1, got 1\.5"),
        (SequentialRules, {"max_gap": 0}, r"SequentialRules\.fit: max_gap must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(kind: Any, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind.fit(_ITEMS, _CU_SEQLENS, 5, **settings)
