"""Scores as inner products: z-scores without the scores, and the exact best with biases on history items."""

import weakref

import pytest
import torch
from torch import Tensor

from laser_fast.data import PackedSequences
from laser_fast.recommenders.item_to_item import SequentialRules
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration
from laser_fast.retrieval.inner_product import InnerProductIndex, ScoreBlock, packed_tensors
from laser_fast.retrieval.requests import best_items

ITEMS, WIDTH = 60, 5
HISTORIES = PackedSequences.from_lists([[3, 9, 3, 7], [], [59], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 3]])
QUERIES = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5


class _Products:
    """Scores `queries @ items.T` for the histories above."""

    def __init__(self, items: Tensor, queries: Tensor = QUERIES) -> None:
        self.items, self.queries, self.num_items = items, queries, len(items)

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.queries @ self.items.T

    def block(self, weight: float, standardize: bool) -> ScoreBlock:
        return ScoreBlock(self.items, lambda histories: self.queries, weight, standardize)


def rows(seed: int, count: int = ITEMS) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def reference(parts: dict[str, tuple[_Products, float, bool]], history_bias: float, last_bias: float) -> Tensor:
    settings = Calibration(
        {name: weight for name, (_, weight, _) in parts.items()},
        tuple(name for name, (_, _, standardize) in parts.items() if standardize),
        history_bias,
        last_bias,
    )
    scorer = CalibratedScorer({name: part for name, (part, _, _) in parts.items()}, settings, torch.zeros(ITEMS))
    return scorer.score(torch.from_numpy(HISTORIES.items), torch.from_numpy(HISTORIES.cu_seqlens))


def check(found: tuple[Tensor, Tensor], scores: Tensor, k: int) -> None:
    """The k best of these scores and no others."""
    assert found[0].shape == found[1].shape == (len(scores), k)
    if k > ITEMS:
        assert bool((found[0][:, ITEMS:] == -torch.inf).all()) and bool((found[1][:, ITEMS:] == -1).all())
        found = found[0][:, :ITEMS], found[1][:, :ITEMS]
    values, items = best_items(scores, k)
    torch.testing.assert_close(found[0], values, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], items.masked_fill(values == -torch.inf, -1))


@pytest.mark.parametrize("biases", [(0.0, 0.0), (-3.0, 0.0), (2.5, -1.0), (-3.0, 40.0), (0.0, 1.5)])
@pytest.mark.parametrize("standardize", ["", "a", "ab"])
@pytest.mark.parametrize("k", [1, 4, ITEMS, 2 * ITEMS])
def test_search_is_the_sorted_score(biases: tuple[float, float], standardize: str, k: int) -> None:
    parts = {
        "a": (_Products(rows(2) + 3.0), 0.7, "a" in standardize),
        "b": (_Products(rows(3), QUERIES.flip(0)), -1.3, "b" in standardize),
    }
    index = InnerProductIndex(
        [part.block(weight, own) for part, weight, own in parts.values()], history_bias=biases[0], last_bias=biases[1]
    )
    assert index.item_vectors.shape == (ITEMS, 2 * WIDTH) and index.item_vectors.dtype == torch.float32
    scores = reference(parts, *biases)
    check(index.search(HISTORIES, k), scores, k)
    blocked = torch.zeros(ITEMS, dtype=torch.bool)
    blocked[[3, 10, 11, 12, 59]] = True
    allowed = scores.masked_fill(blocked, -torch.inf)
    check(index.search(HISTORIES, k, blocked=blocked), allowed, k)
    unseen = allowed.clone()
    for row in range(len(HISTORIES)):
        unseen[row, torch.from_numpy(HISTORIES[row])] = -torch.inf
    check(index.search(HISTORIES, k, exclude_seen=True, blocked=blocked), unseen, k)


@pytest.mark.parametrize("weight", [0.7, -2.0])
@pytest.mark.parametrize("biases", [(0.0, 0.0), (-3.0, 1.0)])
@pytest.mark.parametrize("k", [1, 4, ITEMS])
def test_rules_are_added_to_the_few_items_they_name(weight: float, biases: tuple[float, float], k: int) -> None:
    part = _Products(rows(2))
    rules = SequentialRules.fit(*packed_tensors(HISTORIES), ITEMS)
    index = InnerProductIndex(
        [part.block(1.0, True)], history_bias=biases[0], last_bias=biases[1], rules=[(rules, weight)]
    )
    settings = Calibration({"a": 1.0, "rules": weight}, ("a",), *biases)
    scorer = CalibratedScorer({"a": part, "rules": rules}, settings, torch.zeros(ITEMS))
    scores = scorer.score(*packed_tensors(HISTORIES))
    assert bool((scores - reference({"a": (part, 1.0, True)}, *biases)).any())
    check(index.search(HISTORIES, k), scores, k)
    blocked = torch.zeros(ITEMS, dtype=torch.bool)
    blocked[[3, 10, 11, 12, 59]] = True
    for row in range(len(HISTORIES)):
        scores[row, torch.from_numpy(HISTORIES[row])] = -torch.inf
    allowed = scores.masked_fill(blocked, -torch.inf)
    check(index.search(HISTORIES, k, exclude_seen=True, blocked=blocked), allowed, k)


def test_any_index_of_inner_products_finds_the_best() -> None:
    part = _Products(rows(2))
    index = InnerProductIndex([part.block(1.0, True)], history_bias=0.4, last_bias=-2.0)
    queries, scores = index.query_vectors(HISTORIES), reference({"a": (part, 1.0, True)}, 0.4, -2.0)
    for k in (1, 5):
        candidates = (queries @ index.item_vectors.T).topk(k + int(HISTORIES.lengths.max())).indices
        check(index.rerank(HISTORIES, queries, candidates, k), scores, k)
        # what FAISS writes where it finds nothing, and what a careless one finds twice
        candidates = torch.cat(
            [candidates, candidates[:, :3], torch.full((5, 2), -1), torch.full((5, 1), ITEMS)], dim=1
        )
        check(index.rerank(HISTORIES, queries, candidates, k), scores, k)
    unseen = index.rerank(HISTORIES, queries, candidates, ITEMS, exclude_seen=True)[1]
    assert not bool(torch.isin(unseen[3], torch.arange(10)).any()) and bool((unseen[3] >= 10).any())
    blocked = torch.ones(ITEMS, dtype=torch.bool)
    values, items = index.rerank(HISTORIES, queries, candidates, 2, blocked=blocked)
    assert bool((values == -torch.inf).all()) and bool((items == -1).all())


def test_equal_items_come_in_their_order() -> None:
    vectors = rows(4, 6).repeat(10, 1)
    part = _Products(vectors)
    for biases in ((0.0, 0.0), (-1.0, 1.0), (1e-3, 0.0)):
        index = InnerProductIndex([part.block(1.0, False)], history_bias=biases[0], last_bias=biases[1])
        biased = {7, 3, 9} if biases[0] else set()
        for k in (7, 12):
            items = index.search(HISTORIES, k)[1]
            assert items[1, :7].tolist() == sorted(items[1, :7].tolist())  # an empty history: copies of one item
            for kind in range(6):
                same = [item for item in items[0].tolist() if item % 6 == kind and item not in biased]
                assert same == sorted(same)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3])
def test_z_scores_are_accurate_where_all_scores_are_large(offset: float) -> None:
    part = _Products(rows(5).double() + offset, QUERIES.double())
    scores = part.score(*(torch.empty(0),) * 2)
    exact = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0)
    index = InnerProductIndex([_Products(part.items.float()).block(1.0, True)])
    # the items themselves are rounded to float32, by offset * 2**-24 each
    found = index.query_vectors(HISTORIES) @ index.item_vectors.T
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5 + 4e-7 * offset)


def test_constant_rows_have_no_z_score() -> None:
    vectors = rows(6).index_fill(1, torch.tensor([0]), 5.0)  # all alike in their first column
    queries = torch.zeros(5, WIDTH)
    queries[:2, 0] = torch.tensor([3.0, -1e-3])  # constant; the third is 0; the fourth is not constant
    queries[3] = 1.0
    part = _Products(vectors, queries)
    index = InnerProductIndex([part.block(2.0, True)], history_bias=0.5)
    check(index.search(HISTORIES, 7), reference({"a": (part, 2.0, True)}, 0.5, 0.0), 7)
    assert bool((index.query_vectors(HISTORIES)[[0, 1, 2, 4]] == 0).all())


def test_the_rows_of_the_blocks_are_not_kept_beside_the_vectors() -> None:
    vectors = rows(2)
    index, kept = InnerProductIndex([ScoreBlock(vectors, lambda histories: QUERIES, 1.0, True)]), weakref.ref(vectors)
    del vectors
    assert kept() is None and index.num_items == ITEMS


def test_no_histories_and_scores_that_are_none() -> None:
    index = InnerProductIndex([ScoreBlock(rows(2), lambda histories: QUERIES[: len(histories)])], history_bias=1.0)
    nobody = PackedSequences.from_lists([])
    assert [found.shape for found in index.search(nobody, 3)] == [(0, 3), (0, 3)]
    broken = InnerProductIndex([ScoreBlock(rows(2), lambda histories: QUERIES * torch.nan)], history_bias=1.0)
    assert all(bool((broken.search(HISTORIES, k)[1] == -1).all()) for k in (3, 30))


def test_history_items_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    part = _Products(rows(2))
    index = InnerProductIndex([part.block(1.0, True)], history_bias=0.4)
    whole = index.search(HISTORIES, 8)
    monkeypatch.setattr("laser_fast.retrieval.inner_product._GATHERED", 2 * WIDTH)
    again = InnerProductIndex([part.block(1.0, True)], history_bias=0.4)
    found = again.search(HISTORIES, 8)
    torch.testing.assert_close(found[0], whole[0])
    assert torch.equal(found[1], whole[1])


def test_what_does_not_fit_is_refused() -> None:
    index = InnerProductIndex([_Products(rows(2)).block(1.0, False)], history_bias=1.0)
    queries = index.query_vectors(HISTORIES)
    found = torch.zeros(5, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"query_vectors: items must be in 0\.\.59, got 60"):
        index.search(PackedSequences.from_lists([[60]]), 1)
    with pytest.raises(ValueError, match=r"InnerProductIndex\.search: k must be at least 1, got 0"):
        index.search(HISTORIES, 0)
    with pytest.raises(ValueError, match=r"InnerProductIndex\.rerank: k must be at least 1, got -1"):
        index.rerank(HISTORIES, queries, found, -1)
    with pytest.raises(TypeError, match=r"search: blocked must be bool, got torch\.int64"):
        index.search(HISTORIES, 1, blocked=torch.zeros(ITEMS, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"rerank: blocked must be \[60\], got \(2,\)"):
        index.rerank(HISTORIES, queries, found, 1, blocked=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"candidates must be int64, got torch\.int32"):
        index.rerank(HISTORIES, queries, found.int(), 1)
    with pytest.raises(ValueError, match=r"candidates must be \[5, C\], got \(4, 2\)"):
        index.rerank(HISTORIES, queries, found[:4], 1)
    with pytest.raises(ValueError, match=r"queries must be \[5, 5\], got \(5, 4\)"):
        index.rerank(HISTORIES, queries[:, :4], found, 1)
