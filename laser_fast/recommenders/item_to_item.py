"""Sums over the items of a history from a sparse item-to-item table: item neighbours and sequential rules.

The tables are on the CPU; `score` takes histories from any device and answers there.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from laser_fast.recommenders.protocol import check_histories, newest_items

Array = Tensor | np.ndarray
Entries = tuple[Tensor, Tensor, Tensor]
"""Rows int64 [n], columns int64 [n] and values [n] of a sparse table."""

_ITEMS_PER_BLOCK = 4096  # items whose neighbours are found at a time
_EVENTS_PER_BLOCK = 2**18  # events whose followers are counted at a time


@dataclass(eq=False, repr=False)
class ItemToItem:
    """score_i = sum_k decay^k * table[h_k, i], h_0 the newest history item; 0 everywhere for an empty history."""

    bounds: Tensor  # int64 [I+1], where the entries of each history item start and end
    columns: Tensor  # int64 [n], the scored item of each entry
    values: Tensor  # float32 [n]
    _: KW_ONLY
    decay: float  # weight ratio of an item to the next newer one, 0..1
    max_history: int  # newest history items that are read

    @property
    def num_items(self) -> int:
        """See `Scorer.num_items`."""
        return self.bounds.numel() - 1

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`."""
        places, values = self._entries(items, cu_seqlens)
        scores = torch.zeros(cu_seqlens.numel() - 1, self.num_items)
        scores.view(-1).index_add_(0, places, values)
        return scores.to(items.device)

    def sparse_score(self, items: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The scores that are not 0: ascending places b * I + i, int64 [n], and values float32 [n], on the CPU."""
        places, values = self._entries(items, cu_seqlens)
        distinct, place = torch.unique(places, return_inverse=True)
        return distinct, torch.zeros(distinct.numel()).index_add_(0, place, values)

    def _entries(self, items: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Every summand: its place b * I + i, int64 [n], and its value, float32 [n], on the CPU."""
        check_histories(f"{type(self).__name__}.score", items, cu_seqlens, self.num_items)
        items, cu_seqlens = newest_items(items.cpu(), cu_seqlens.cpu(), self.max_history)
        row = torch.repeat_interleave(cu_seqlens.long().diff(), output_size=items.numel())
        age = cu_seqlens[1:].long()[row] - 1 - torch.arange(items.numel())  # 0 for the newest item
        first, counts = self.bounds[items], self.bounds[items + 1] - self.bounds[items]
        of = torch.repeat_interleave(counts, output_size=int(counts.sum()))  # the history item of each entry
        entry = torch.arange(of.numel()) + (first - (counts.cumsum(0) - counts))[of]
        return row[of] * self.num_items + self.columns[entry], self.decay ** age[of].float() * self.values[entry]


class ItemKNN(ItemToItem):
    """An `ItemToItem` of similarities c_ij / (sqrt(n_i n_j) + shrinkage).

    c_ij is the number of sequences with both items and n_i that with item i; an item is not its own neighbour.
    """

    @classmethod
    def fit(
        cls,
        items: Array,
        cu_seqlens: Array,
        num_items: int,
        *,
        shrinkage: float = 20.0,
        decay: float = 0.8,
        max_neighbors: int = 1000,
        max_history: int = 50,
    ) -> ItemKNN:
        """Similarities of packed sequences (items [N] int64, cu_seqlens [B+1] int32).

        Args:
            max_neighbors: most similar items that are kept of each item, ties by the lower index; 12 bytes each.
        """
        if shrinkage < 0:
            raise ValueError(f"ItemKNN.fit: shrinkage must be at least 0, got {shrinkage}")
        _check_settings("ItemKNN.fit", decay, max_neighbors=max_neighbors, max_history=max_history)
        items, cu_seqlens = packed_histories("ItemKNN.fit", items, cu_seqlens, num_items)
        sequence = torch.repeat_interleave(cu_seqlens.long().diff(), output_size=items.numel())
        shape = num_items, cu_seqlens.numel() - 1
        holds = csr_array((np.ones(items.numel()), (items.numpy(), sequence.numpy())), shape)
        holds.data[:] = 1.0  # repeats were added up
        counts = np.diff(holds.indptr).astype(np.float64)
        blocks = []
        for start in range(0, num_items, _ITEMS_PER_BLOCK):
            together = (holds[start : start + _ITEMS_PER_BLOCK] @ holds.T).tocoo()
            rows, columns = together.row.astype(np.int64) + start, together.col.astype(np.int64)
            similarity = together.data / (np.sqrt(counts[rows] * counts[columns]) + shrinkage)
            other = rows != columns  # an item is not its own neighbour
            found = rows[other], columns[other], similarity[other].astype(np.float32)
            blocks.append(_strongest(*found, max_neighbors))
        return cls(*entries_by_row(blocks, num_items), decay=decay, max_history=max_history)


class SequentialRules(ItemToItem):
    """An `ItemToItem` of rules log(1 + c(j, i)), c(j, i) = sum of 1 / gap over every i that followed a j.

    The gap is the number of events from j to i, 1 for the next one. Rules are directed, and an item may follow itself:
    they know which items are bought again.

    Source: sequential rules (Kamehkhosh, Jannach & Ludewig, 2017), which read the last item alone; here the whole
    history is read, and the logarithm keeps one frequent pair from outweighing everything else.
    """

    @classmethod
    def fit(
        cls,
        items: Array,
        cu_seqlens: Array,
        num_items: int,
        *,
        max_gap: int = 30,
        decay: float = 0.5,
        max_neighbors: int = 200,
        max_history: int = 10,
    ) -> SequentialRules:
        """Rules of packed sequences (items [N] int64, cu_seqlens [B+1] int32).

        Args:
            max_neighbors: strongest rules that are kept of each item, ties by the lower index; 12 bytes each.
        """
        limits = {"max_gap": max_gap, "max_neighbors": max_neighbors, "max_history": max_history}
        _check_settings("SequentialRules.fit", decay, **limits)
        items, cu_seqlens = packed_histories("SequentialRules.fit", items, cu_seqlens, num_items)
        lengths = cu_seqlens.long().diff()
        end = torch.repeat_interleave(cu_seqlens[1:].long(), lengths, output_size=items.numel())
        order = items.argsort(stable=True)  # events of one item side by side
        blocks = []
        for start, stop in _item_blocks(torch.bincount(items, minlength=num_items)):
            rows, columns, counts = followers(items, end, order[start:stop], max_gap)
            strength = torch.log1p(counts).float()
            blocks.append(_strongest(rows.numpy(), columns.numpy(), strength.numpy(), max_neighbors))
        return cls(*entries_by_row(blocks, num_items), decay=decay, max_history=max_history)


def _check_settings(function: str, decay: float, **limits: int) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"{function}: decay must be in 0..1, got {decay}")
    for name, limit in limits.items():
        if limit < 1:
            raise ValueError(f"{function}: {name} must be at least 1, got {limit}")


def _item_blocks(counts: Tensor) -> list[tuple[int, int]]:
    """Bounds of runs of whole items, of about `_EVENTS_PER_BLOCK` events, in events sorted by item; at least one."""
    bounds, total = counts.cumsum(0), int(counts.sum())
    marks = torch.arange(_EVENTS_PER_BLOCK, max(total, _EVENTS_PER_BLOCK), _EVENTS_PER_BLOCK)
    inner = bounds[torch.searchsorted(bounds, marks)].tolist()
    return list(pairwise(sorted({0, *inner, total}))) or [(0, 0)]


def followers(items: Tensor, end: Tensor, places: Tensor, max_gap: int) -> Entries:
    """c(j, i) of the events at `places`, in float64; `end` int64 [N] is where the sequence of each event ends."""
    num_items = int(items.max()) + 1 if items.numel() else 1
    keys, weights = [], []
    for gap in range(1, max_gap + 1):
        earlier = places[places + gap < end[places]]
        keys.append(items[earlier] * num_items + items[earlier + gap])
        weights.append(torch.full((earlier.numel(),), 1.0 / gap, dtype=torch.float64))
    pairs, place = torch.unique(torch.cat(keys), return_inverse=True)
    counts = torch.zeros(pairs.numel(), dtype=torch.float64).index_add_(0, place, torch.cat(weights))
    return pairs // num_items, pairs % num_items, counts


def _strongest(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, limit: int) -> Entries:
    """The largest `limit` entries of each row, ties by the lower column, sorted by row."""
    order = np.lexsort((columns, -values, rows))
    counts = np.bincount(rows)
    place = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)  # within its row
    kept = order[place < limit]
    return torch.from_numpy(rows[kept]), torch.from_numpy(columns[kept]), torch.from_numpy(values[kept])


def entries_by_row(blocks: list[Entries], num_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds, columns and values, as `ItemToItem` holds them, of entries that are sorted by row."""
    rows, columns, values = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return F.pad(torch.bincount(rows, minlength=num_items).cumsum(0), (1, 0)), columns, values


def packed_histories(function: str, items: Array, cu_seqlens: Array, num_items: int) -> tuple[Tensor, Tensor]:
    """The histories as CPU tensors, checked."""
    packed = torch.as_tensor(items).cpu(), torch.as_tensor(cu_seqlens).cpu()
    check_histories(function, *packed, num_items)
    return packed


def refuse_other_table(values: dict[str, Tensor], num_items: int, name: str) -> None:
    """Raise ValueError where the tensors of a file are no table of an `ItemToItem`, which reads them unchecked."""
    if values.keys() != {"bounds", "columns", "values"}:
        raise ValueError(f"checkpoint: {name} must hold bounds, columns and values, got {sorted(values)}")
    bounds, columns, entries = values["bounds"], values["columns"], values["values"]
    number = columns.numel()
    if bounds.shape != (num_items + 1,):
        raise ValueError(f"checkpoint: {name} must be of {num_items} items, got {bounds.numel() - 1}")
    dtypes, shapes = [bounds.dtype, columns.dtype, entries.dtype], [tuple(columns.shape), tuple(entries.shape)]
    if dtypes != [torch.int64, torch.int64, torch.float32] or shapes != [(number,), (number,)]:
        rule, found = "int64 bounds and columns and as many float32 values", f"{dtypes} and shapes {shapes}"
    elif bounds[0] != 0 or bounds[-1] != number or (bounds.diff() < 0).any():
        falls = int((bounds.diff() < 0).sum())
        rule, found = f"bounds that rise from 0 to {number}", f"{bounds[0]} to {bounds[-1]} with {falls} falls"
    elif number and (columns.min() < 0 or columns.max() >= num_items):
        rule, found = f"columns in 0..{num_items - 1}", f"{columns.min()}..{columns.max()}"
    else:
        return
    raise ValueError(f"checkpoint: {name} must hold {rule}, got {found}")
