"""A score as the inner product of a user's vector with an item's, and the best items by it.

    score_bi = q_b . m_i + history_bias [i in history_b] + last_bias [i is last_b] + w * rules_bi

Both vectors are blocks side by side, one for each part of the score. `LaserModel` has these:

    part         block of q_b             block of m_i
    Laser        w * unit user / tau      unit item
    recommender  w * state                row of its output layer
    popularity   p                        log(1 + count_i)

The other terms differ from 0 only for the items of the history and those that rules name for it.

A part that is z-scored over the catalogue keeps this form. With the mean e and the covariance C (float64) of its item
rows E, the scores s . E_i have the mean s . e and the variance s' C s. So its blocks are w * s / sqrt(s' C s) and
E_i - e, and no scores [B, I] are computed.

Source: our own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.data.sequences import PackedSequences
from laser_fast.ops import ItemLists, catalog_topk
from laser_fast.ops.precision import autocast_off
from laser_fast.recommenders.item_to_item import ItemToItem
from laser_fast.recommenders.protocol import check_histories, repeat_positions
from laser_fast.retrieval.requests import best_items

_GATHERED = 2**22  # elements of the rows that are gathered at once
_CONSTANT = 1e-6  # as in `standard_scores`: a row with less deviation than this share of its level is constant
# lists of at least this share of the catalogue are cut from all scores, which are no larger and need no merging (4
# users, 100k items, one core: k = 1,000 takes 0.25 s in chunks and 0.17 s so, k = 100k 4.3 s and 0.15 s)
_LONG_LISTS = 1 / 8


@dataclass(frozen=True, eq=False)
class ScoreBlock:
    """A part of a score that is an inner product."""

    items: Tensor  # [I, D], floating point
    queries: Callable[[PackedSequences], Tensor]  # B histories -> [B, D], floating point, on any device
    weight: float = 1.0
    standardize: bool = False  # z-score it over the catalogue before it is weighted


class InnerProductIndex:
    """Items and users as vectors whose inner products rank, for `search` here or any index of inner products.

        index = model.index()
        flat = faiss.IndexFlatIP(index.item_vectors.shape[1])
        flat.add(index.item_vectors.cpu().numpy())
        histories = PackedSequences.from_lists([[model.index_of_item[item] for item in ("50", "172")]])
        queries = index.query_vectors(histories)
        _, candidates = flat.search(queries.cpu().numpy(), k + int(histories.lengths.max()))
        scores, items = index.rerank(histories, queries, torch.from_numpy(candidates), k)

    `rerank` adds the terms that are no inner product: biases and rules. With that many candidates, the result is as
    exact as the index that found them.

    An index keeps the values it was made of: ask the model for another one after a change.

    Args:
        blocks: the parts of the score, at least one.
        history_bias, last_bias: see `Calibration`.
        rules: sparse tables with their factors.

    Attributes:
        item_vectors: m, float32 [I, D'].
    """

    def __init__(
        self,
        blocks: Sequence[ScoreBlock],
        *,
        history_bias: float = 0.0,
        last_bias: float = 0.0,
        rules: Sequence[tuple[ItemToItem, float]] = (),
    ) -> None:
        self._blocks, vectors = list[_Queries](), list[Tensor]()
        for block in blocks:
            rows = block.items.detach().float()
            mean, covariance = _moments(rows) if block.standardize else (None, None)
            self._blocks.append(_Queries(block.queries, block.weight, mean, covariance))
            vectors.append(rows if mean is None else rows - mean.to(rows))
        self.item_vectors = torch.cat(vectors, dim=1)
        self.num_items = self.item_vectors.shape[0]
        self.history_bias = history_bias
        self.last_bias = last_bias
        self.rules = [(table, weight) for table, weight in rules if weight]

    @torch.no_grad()
    def query_vectors(self, histories: PackedSequences) -> Tensor:
        """q of each history of item indices, oldest first: float32 [B, D'], on the device of `item_vectors`."""
        check_histories("InnerProductIndex.query_vectors", *packed_tensors(histories), self.num_items)
        return torch.cat([block(histories).to(self.item_vectors.device) for block in self._blocks], dim=1)

    @torch.no_grad()
    def search(
        self, histories: PackedSequences, k: int, *, exclude_seen: bool = False, blocked: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k items with the highest scores for every history, biases and rules included.

        The scores of all items, [B, I], are held only where k is an eighth of I or more.

        Args:
            histories: B histories of item indices, oldest first.
            k: length of the lists, at least 1; may exceed I.
            exclude_seen: leave out the items of the history.
            blocked: bool [I], items to leave out.

        Returns:
            Scores float32 [B, k], descending, ties by item index, and item indices int64 [B, k]; -inf and -1 where
            fewer are left.
        """
        allow = self._allowed("search", k, blocked)
        queries = self.query_vectors(histories)
        places, added = touched = self._touched(histories, exclude_seen)
        if k >= _LONG_LISTS * self.num_items:
            with autocast_off(queries.device):
                scores = queries @ self.item_vectors.T
            scores.view(-1)[places] += added
            if allow is not None:
                scores.masked_fill_(~allow, -torch.inf)
            return _first(scores.nan_to_num_(-torch.inf, torch.inf, -torch.inf), k)
        exclude = None
        if places.numel():  # of all other items q . m is the score
            users = torch.arange(len(histories) + 1, device=places.device) * self.num_items
            exclude = ItemLists(places % self.num_items, torch.searchsorted(places, users).int())
        scores, items = catalog_topk(queries, self.item_vectors, k, exclude=exclude, allow=allow, normalize=False)
        return (scores, items) if exclude is None else self._merge(queries, items, touched, k, allow)

    @torch.no_grad()
    def rerank(
        self,
        histories: PackedSequences,
        queries: Tensor,
        candidates: Tensor,
        k: int,
        *,
        exclude_seen: bool = False,
        blocked: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best of the candidates and of the items that biases or rules touch, by the whole score, as `search`.

        Args:
            queries: [B, D'], the `query_vectors` of the histories.
            candidates: int64 [B, C], found by any index; repetitions, and places outside the catalogue (FAISS writes
                -1), are ignored.
            histories, k, exclude_seen, blocked: see `search`.
        """
        allow = self._allowed("rerank", k, blocked)
        batch, device = len(histories), self.item_vectors.device
        if candidates.dtype != torch.int64:
            raise TypeError(f"InnerProductIndex.rerank: candidates must be int64, got {candidates.dtype}")
        if candidates.dim() != 2 or candidates.shape[0] != batch:
            raise ValueError(
                f"InnerProductIndex.rerank: candidates must be [{batch}, C], got {tuple(candidates.shape)}"
            )
        if tuple(queries.shape) != (batch, self.item_vectors.shape[1]):
            raise ValueError(
                f"InnerProductIndex.rerank: queries must be [{batch}, {self.item_vectors.shape[1]}], "
                f"got {tuple(queries.shape)}"
            )
        touched = self._touched(histories, exclude_seen)
        return self._merge(queries.to(device), candidates.to(device), touched, k, allow)

    def _merge(
        self, queries: Tensor, candidates: Tensor, touched: tuple[Tensor, Tensor], k: int, allow: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The k best of the candidates [B, C] and of the `touched` items, scored one by one."""
        (places_touched, added), batch, device = touched, len(queries), queries.device
        inside = (candidates >= 0) & (candidates < self.num_items)
        found = (candidates + torch.arange(batch, device=device)[:, None] * self.num_items)[inside]
        places = torch.unique(torch.cat([found, places_touched]))  # by user, then by item
        row, item = places // self.num_items, places % self.num_items
        step = max(1, _GATHERED // queries.shape[1])
        pairs = zip(row.split(step), item.split(step), strict=True)
        # not a product of matrices: equal vectors have equal scores wherever they stand
        scores = torch.cat([(queries[users] * self.item_vectors[items]).sum(dim=1) for users, items in pairs])
        scores[torch.searchsorted(places, places_touched)] += added
        if allow is not None:
            scores = scores.masked_fill(~allow[item], -torch.inf)
        return _best_of_rows(scores, row, item, (batch, k))

    def _touched(self, histories: PackedSequences, exclude_seen: bool) -> tuple[Tensor, Tensor]:
        """Places b * I + i, ascending, int64 [n], and what biases and rules add there, -inf for seen: float32 [n]."""
        device = self.item_vectors.device
        seen, last = repeat_positions(*packed_tensors(histories, device), self.num_items)
        parts = [(seen, -torch.inf)] if exclude_seen else []
        if not exclude_seen and (self.history_bias or self.last_bias):
            parts = [(seen, self.history_bias), (last, self.last_bias)]
        filled = [(places, torch.full(places.shape, value, device=device)) for places, value in parts]
        for table, weight in self.rules:
            places, values = table.sparse_score(*packed_tensors(histories))
            filled.append((places.to(device), weight * values.to(device)))
        if not filled:
            return seen[:0], torch.empty(0, device=device)
        distinct, place = torch.unique(torch.cat([places for places, _ in filled]), return_inverse=True)
        added = torch.zeros(distinct.shape, device=device)
        return distinct, added.index_add_(0, place, torch.cat([values for _, values in filled]))

    def _allowed(self, function: str, k: int, blocked: Tensor | None) -> Tensor | None:
        """What is not blocked; checks `k` and `blocked`."""
        if k < 1:
            raise ValueError(f"InnerProductIndex.{function}: k must be at least 1, got {k}")
        if blocked is None:
            return None
        if blocked.dtype != torch.bool:
            raise TypeError(f"InnerProductIndex.{function}: blocked must be bool, got {blocked.dtype}")
        if tuple(blocked.shape) != (self.num_items,):
            raise ValueError(
                f"InnerProductIndex.{function}: blocked must be [{self.num_items}], got {tuple(blocked.shape)}"
            )
        return ~blocked.to(self.item_vectors.device)


def packed_tensors(histories: PackedSequences, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Items int64 [N] and `cu_seqlens` int32 [B+1] on a device."""
    return torch.from_numpy(histories.items).to(device), torch.from_numpy(histories.cu_seqlens).to(device)


@dataclass(frozen=True, eq=False)
class _Queries:
    """A block of q, with the moments of its item rows, float64 [D] and [D, D], where it is z-scored."""

    queries: Callable[[PackedSequences], Tensor]
    weight: float
    mean: Tensor | None
    covariance: Tensor | None

    def __call__(self, histories: PackedSequences) -> Tensor:
        queries = self.queries(histories)
        if self.mean is None or self.covariance is None:
            return self.weight * queries.float()
        wide = queries.to(self.mean)
        deviation = ((wide @ self.covariance) * wide).sum(dim=1).clamp_min(0.0).sqrt()
        constant = deviation <= _CONSTANT * (wide @ self.mean).abs()
        factor = torch.where(constant, 0.0, self.weight / deviation.clamp_min(1e-30))
        return (wide * factor[:, None]).float()


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of the rows of [I, D], float64; few rows at a time are held so."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(max(1, _GATHERED // rows.shape[1])):
        centred = part.double() - mean
        covariance += centred.T @ centred
    return mean, covariance / rows.shape[0]


def _best_of_rows(scores: Tensor, row: Tensor, item: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The k best of each row of packed scores [n], ordered by row and item: scores and items [B, k]."""
    batch, k = shape
    count = torch.bincount(row, minlength=batch)
    width = int(count.max()) if batch else 0
    position = torch.arange(row.numel(), device=row.device) - F.pad(count.cumsum(0), (1, 0))[row]
    table = scores.new_full((batch, width), -torch.inf)
    names = row.new_full((batch, width), -1)
    table[row, position], names[row, position] = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf), item
    values, places = _first(table, k)
    return values, torch.where(places < 0, -1, names.gather(1, places.clamp_min(0)))


def _first(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, ties by column; -inf and -1 where there are none."""
    (values, columns), missing = best_items(scores, k), max(k - scores.shape[1], 0)
    values = F.pad(values, (0, missing), value=-torch.inf)
    return values, F.pad(columns, (0, missing)).masked_fill(values == -torch.inf, -1)
