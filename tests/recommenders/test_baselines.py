"""Counting baselines against tables worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.recommenders import ItemKNN, Markov1, Popularity, Scorer, SequentialRules, item_to_item

# sequences 0 1 2 | 0 1 | 3 0 1 0 | (empty); catalogue of 5, item 4 unseen
_ITEMS = torch.tensor([0, 1, 2, 0, 1, 3, 0, 1, 0])
_CU_SEQLENS = torch.tensor([0, 3, 5, 9, 9], dtype=torch.int32)
_COUNTS = [4, 3, 1, 1, 0]


def _pack(*histories: list[int]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *map(len, histories)])
    return torch.tensor([item for history in histories for item in history], dtype=torch.int64), lengths.cumsum(0).int()


def test_popularity_counts_events() -> None:
    scores = Popularity.fit(_ITEMS, _CU_SEQLENS, 5).score(*_pack([2], [], [0, 1]))
    assert scores.tolist() == [_COUNTS] * 3


def test_markov_counts_transitions_and_breaks_ties_by_popularity() -> None:
    scores = Markov1.fit(_ITEMS, _CU_SEQLENS, 5).score(*_pack([3, 0], [1], [2], []))
    popularity = np.array(_COUNTS) / 5
    transitions = np.array([[0, 3, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_allclose(scores.numpy(), transitions + popularity, rtol=1e-6)


def test_markov_reads_no_transition_across_users() -> None:
    scores = Markov1.fit(torch.tensor([0, 1]), torch.tensor([0, 1, 2], dtype=torch.int32), 3).score(*_pack([0]))
    np.testing.assert_allclose(scores[0].numpy(), np.array([1, 1, 0]) / 2, rtol=1e-6)


def test_knn_by_hand() -> None:
    # sequences with the item: 0 in 3, 1 in 3, 2 in 1, 3 in 1; together: 01 in 3, 02 in 1, 12 in 1, 03 in 1, 13 in 1
    similar = np.zeros((5, 5))
    for a, b, together, size in [(0, 1, 3, 9), (0, 2, 1, 3), (1, 2, 1, 3), (0, 3, 1, 3), (1, 3, 1, 3)]:
        similar[a, b] = similar[b, a] = together / (math.sqrt(size) + 20)
    scores = ItemKNN.fit(_ITEMS, _CU_SEQLENS, 5).score(*_pack([2, 0, 1], [], [1, 1], [4]))
    expected = np.stack([similar[1] + 0.8 * similar[0] + 0.64 * similar[2], np.zeros(5), 1.8 * similar[1], np.zeros(5)])
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6)


def test_knn_keeps_the_strongest_neighbours() -> None:
    knn = ItemKNN.fit(_ITEMS, _CU_SEQLENS, 5, max_neighbors=1, shrinkage=0.0)
    # item 2 is tied between 0 and 1 and item 3 as well: the lower index wins
    scores = knn.score(*_pack([0], [2], [3]))
    np.testing.assert_allclose(
        scores.numpy(), [[0, 1, 0, 0, 0], [1 / math.sqrt(3), 0, 0, 0, 0], [1 / math.sqrt(3), 0, 0, 0, 0]], rtol=1e-6
    )


def test_knn_reads_the_newest_items_only() -> None:
    knn = ItemKNN.fit(_ITEMS, _CU_SEQLENS, 5, max_history=2)
    long, short = knn.score(*_pack([2, 0, 1], [0, 1]))
    assert torch.equal(long, short)


def test_knn_equals_dense_arithmetic_on_random_data() -> None:
    generator = np.random.default_rng(3)
    histories = [generator.integers(0, 30, generator.integers(0, 9)).tolist() for _ in range(200)]
    items, cu_seqlens = _pack(*histories)
    seen = np.zeros((200, 30))
    for row, history in enumerate(histories):
        seen[row, history] = 1
    counts = seen.sum(0)
    similar = seen.T @ seen / (np.sqrt(np.outer(counts, counts)) + 20)
    np.fill_diagonal(similar, 0)
    expected = np.stack(
        [sum((0.8**age * similar[i] for age, i in enumerate(h[::-1])), np.zeros(30)) for h in histories]
    )
    np.testing.assert_allclose(ItemKNN.fit(items, cu_seqlens, 30).score(items, cu_seqlens).numpy(), expected, atol=1e-6)


def test_rules_by_hand() -> None:
    # what follows a 0: 1 (three times at once), 2 (after 2), 0 (after 2); a 1: 2 at once, 0 at once; a 3: 0, 1, 0
    rules = np.zeros((5, 5))
    rules[0, 1], rules[0, 2], rules[0, 0] = 3, 1 / 2, 1 / 2
    rules[1, 2] = rules[1, 0] = 1
    rules[3, 0], rules[3, 1] = 1 + 1 / 3, 1 / 2
    table = np.log1p(rules)
    fitted = SequentialRules.fit(_ITEMS, _CU_SEQLENS, 5)
    scores = fitted.score(*_pack([2, 0, 1], [], [0, 0], [3]))
    np.testing.assert_allclose(
        scores.numpy(), np.stack([table[1] + 0.5 * table[0], np.zeros(5), 1.5 * table[0], table[3]]), rtol=1e-6
    )
    only_next = SequentialRules.fit(_ITEMS, _CU_SEQLENS, 5, max_gap=1, max_history=1).score(*_pack([3, 0]))
    np.testing.assert_allclose(only_next.numpy(), [np.log1p([0, 3, 0, 0, 0])], rtol=1e-6)


def test_the_strongest_rules_are_kept() -> None:
    fitted = SequentialRules.fit(_ITEMS, _CU_SEQLENS, 5, max_neighbors=1)
    expected = np.log1p([[0, 3, 0, 0, 0], [1, 0, 0, 0, 0]])  # of 1's two rules, equally strong, that of the lower item
    np.testing.assert_allclose(fitted.score(*_pack([0], [1])).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("events", [1, 7, 10**9])
def test_rules_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch, events: int) -> None:
    generator = np.random.default_rng(4)
    histories = [generator.integers(0, 12, generator.integers(0, 15)).tolist() for _ in range(40)]
    items, cu_seqlens = _pack(*histories)
    counts = np.zeros((14, 14))  # two items nobody has seen
    for history in histories:
        for place, item in enumerate(history):
            for gap, later in enumerate(history[place + 1 : place + 5], start=1):
                counts[item, later] += 1 / gap
    expected = np.stack(
        [sum((0.9**age * np.log1p(counts[i]) for age, i in enumerate(h[::-1])), np.zeros(14)) for h in histories]
    )
    monkeypatch.setattr(item_to_item, "_EVENTS_PER_BLOCK", events)
    fitted = SequentialRules.fit(items, cu_seqlens, 14, max_gap=4, decay=0.9, max_history=20)
    np.testing.assert_allclose(fitted.score(items, cu_seqlens).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [ItemKNN, SequentialRules])
def test_sparse_scores_are_the_scores(kind: type[ItemKNN | SequentialRules]) -> None:
    fitted, histories = kind.fit(_ITEMS, _CU_SEQLENS, 5), _pack([2, 0, 1], [], [4], [0, 0], [3])
    places, values = fitted.sparse_score(*histories)
    assert bool((places.diff() > 0).all())
    dense = torch.zeros(5 * 5).index_put((places,), values).view(5, 5)
    torch.testing.assert_close(dense, fitted.score(*histories))
    assert (dense != 0).sum() == len(places)


@pytest.mark.parametrize("kind", [Popularity, Markov1, ItemKNN, SequentialRules])
def test_edges(kind: type[Popularity | Markov1 | ItemKNN | SequentialRules]) -> None:
    fitted = kind.fit(_ITEMS.numpy(), _CU_SEQLENS.numpy(), 5)
    assert isinstance(fitted, Scorer)
    assert fitted.score(*_pack()).shape == (0, 5)
    scores = fitted.score(*_pack([0, 1, 2, 3, 4], [], [4]))
    assert scores.shape == (3, 5)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    nothing = kind.fit(*_pack([], []), 3)
    assert nothing.score(*_pack([1], [])).tolist() == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.score: items must be in 0\.\.4, got 5"):
        fitted.score(*_pack([5]))
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.fit: items must be in 0\.\.2, got 4"):
        kind.fit(*_pack([1, 4]), 3)


@pytest.mark.parametrize("kind", [Popularity, Markov1, ItemKNN, SequentialRules])
def test_scores_can_be_changed_without_harm(kind: type[Popularity | Markov1 | ItemKNN | SequentialRules]) -> None:
    fitted = kind.fit(_ITEMS, _CU_SEQLENS, 5)
    before = fitted.score(*_pack([0], [1]))
    fitted.score(*_pack([0], [1])).add_(7)
    assert torch.equal(fitted.score(*_pack([0], [1])), before)


def test_knn_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"shrinkage must be >= 0 and decay in 0\.\.1, got -1\.0 and 0\.8"):
        ItemKNN.fit(_ITEMS, _CU_SEQLENS, 5, shrinkage=-1.0)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 50"):
        ItemKNN.fit(_ITEMS, _CU_SEQLENS, 5, max_neighbors=0)


def test_rule_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"decay must be in 0\.\.1, got 1\.5"):
        SequentialRules.fit(_ITEMS, _CU_SEQLENS, 5, decay=1.5)
    with pytest.raises(ValueError, match="max_history must be at least 1, got 0, 200 and 10"):
        SequentialRules.fit(_ITEMS, _CU_SEQLENS, 5, max_gap=0)
