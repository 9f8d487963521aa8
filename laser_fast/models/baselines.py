"""Counting baselines: Popularity, a first-order Markov chain, item nearest neighbours; each a `Scorer`.

They live on the CPU; `score` takes histories from any device and answers there. Tables are sparse, so memory grows with
the number of distinct item pairs seen together, not with the square of the catalogue.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from laser_fast.models.recommender import check_histories, newest_items

Array = Tensor | np.ndarray

_ITEMS_PER_BLOCK = 4096  # items whose neighbours are found at a time


class Popularity:
    """score_i = number of events of item i in the fitted sequences, whatever the history."""

    def __init__(self, counts: Tensor) -> None:
        """Args: counts: [I], events per item."""
        self.counts = counts.float().cpu()
        self.num_items = counts.numel()

    @classmethod
    def fit(cls, items: Array, cu_seqlens: Array, num_items: int) -> Popularity:
        """Count the events of packed sequences (items [N] int64, cu_seqlens [B+1] int32)."""
        items, cu_seqlens = _tensors("Popularity.fit", items, cu_seqlens, num_items)
        return cls(torch.bincount(items, minlength=num_items))

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`."""
        check_histories("Popularity.score", items, cu_seqlens, self.num_items)
        return self.counts.to(items.device).expand(cu_seqlens.numel() - 1, -1).clone()


class Markov1:
    """score_i = |{transitions last -> i}| + count_i / (1 + max count), over directly consecutive events.

    The second term is below 1: popularity decides among items that followed the last item equally often, and alone
    serves histories that are empty or end in an item nothing ever followed.
    """

    def __init__(self, transitions: Tensor, counts: Tensor) -> None:
        """Args: transitions: sparse [I, I], rows = the earlier item; counts: [I], events per item."""
        self._transitions = transitions
        self._popularity = counts.float() / (1.0 + counts.max().float())
        self.num_items = counts.numel()

    @classmethod
    def fit(cls, items: Array, cu_seqlens: Array, num_items: int) -> Markov1:
        """Count the transitions of packed sequences (items [N] int64, cu_seqlens [B+1] int32)."""
        items, cu_seqlens = _tensors("Markov1.fit", items, cu_seqlens, num_items)
        sequence = torch.repeat_interleave(cu_seqlens.long().diff(), output_size=items.numel())
        together = sequence[1:] == sequence[:-1]
        pairs, times = torch.unique(items[:-1][together] * num_items + items[1:][together], return_counts=True)
        transitions = _sparse(pairs // num_items, pairs % num_items, times.float(), (num_items, num_items))
        return cls(transitions, torch.bincount(items, minlength=num_items))

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`."""
        check_histories("Markov1.score", items, cu_seqlens, self.num_items)
        device, items, cu_seqlens = items.device, items.cpu(), cu_seqlens.cpu().long()
        row = (cu_seqlens.diff() > 0).nonzero()[:, 0]
        last = items[cu_seqlens[1:][row] - 1]
        chosen = _sparse(row, last, torch.ones(row.numel()), (cu_seqlens.numel() - 1, self.num_items))
        return (_product(chosen, self._transitions).to_dense() + self._popularity).to(device)


class ItemKNN:
    """score_i = sum_k decay^k * sim(h_k, i), h_0 the newest history item; sim = c_ij / (sqrt(n_i n_j) + shrinkage).

    c_ij is the number of sequences with both items and n_i with item i (repeats inside a sequence count once); an item
    is not its own neighbour. Only the `max_neighbors` most similar items are kept of each item (ties: the lower index),
    which bounds memory by `20 * max_neighbors` bytes per item, and only the newest `max_history` items are read. Scores
    of empty histories are 0 everywhere.
    """

    def __init__(self, similar: Tensor, *, decay: float, max_history: int) -> None:
        """Args: similar: sparse [I, I], rows = the history item; decay: weight ratio of an item to the next newer."""
        self._similar = similar
        self._decay = decay
        self._max_history = max_history
        self.num_items = similar.shape[0]

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

        Raises:
            ValueError: a negative shrinkage, a decay outside 0..1, or a limit below 1.
        """
        if shrinkage < 0 or not 0 <= decay <= 1:
            raise ValueError(f"ItemKNN.fit: shrinkage must be >= 0 and decay in 0..1, got {shrinkage} and {decay}")
        if max_neighbors < 1 or max_history < 1:
            raise ValueError(
                f"ItemKNN.fit: max_neighbors and max_history must be at least 1, got {max_neighbors} and {max_history}"
            )
        items, cu_seqlens = _tensors("ItemKNN.fit", items, cu_seqlens, num_items)
        num_sequences = cu_seqlens.numel() - 1
        sequence = torch.repeat_interleave(cu_seqlens.long().diff(), output_size=items.numel())
        membership = torch.unique(items * max(num_sequences, 1) + sequence)  # sorted by item, each pair once
        item, sequence = membership // max(num_sequences, 1), membership % max(num_sequences, 1)
        counts = torch.bincount(item, minlength=num_items)
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        by_sequence = _sparse(sequence, item, torch.ones(item.numel()), (num_sequences, num_items))
        blocks = []
        for start in range(0, num_items, _ITEMS_PER_BLOCK):
            stop = min(start + _ITEMS_PER_BLOCK, num_items)
            part = slice(int(bounds[start]), int(bounds[stop]))
            present = torch.ones(part.stop - part.start)
            block = _sparse(item[part] - start, sequence[part], present, (stop - start, num_sequences))
            together = _product(block, by_sequence)
            rows, columns = together.indices()
            rows = rows + start
            scale = (counts[rows] * counts[columns]).double().sqrt() + shrinkage
            similarity = (together.values().double() / scale).float()
            blocks.append(_strongest(rows, columns, similarity, max_neighbors))
        rows, columns, values = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        similar = _sparse(rows, columns, values, (num_items, num_items))
        return cls(similar, decay=decay, max_history=max_history)

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`."""
        check_histories("ItemKNN.score", items, cu_seqlens, self.num_items)
        device = items.device
        items, cu_seqlens = newest_items(items.cpu(), cu_seqlens.cpu(), self._max_history)
        lengths = cu_seqlens.long().diff()
        row = torch.repeat_interleave(lengths, output_size=items.numel())
        age = cu_seqlens[1:].long()[row] - 1 - torch.arange(items.numel())  # 0 for the newest item
        # an item that occurs twice gets the sum of its weights
        weights = _sparse(row, items, self._decay ** age.float(), (lengths.numel(), self.num_items))
        return _product(weights, self._similar).to_dense().to(device)


def _tensors(function: str, items: Array, cu_seqlens: Array, num_items: int) -> tuple[Tensor, Tensor]:
    """Arrays or tensors as checked CPU tensors."""
    packed = torch.as_tensor(items).cpu(), torch.as_tensor(cu_seqlens).cpu()
    check_histories(function, *packed, num_items)
    return packed


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sparse float32 matrix; values of one place are added."""
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=True).coalesce()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Sparse times sparse, coalesced."""
    with warnings.catch_warnings():
        # torch announces once that the format it uses inside is in beta; nothing for the caller to act on
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        product: Tensor = torch.sparse.mm(left, right).coalesce()
        return product


def _strongest(rows: Tensor, columns: Tensor, values: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Off-diagonal entries, at most `limit` of each row: the largest, then by lower column. Sorted by row."""
    different = rows != columns
    rows, columns, values = rows[different], columns[different], values[different]
    order = torch.from_numpy(np.lexsort((columns.numpy(), -values.numpy(), rows.numpy())))
    rows, columns, values = rows[order], columns[order], values[order]
    counts = torch.bincount(rows)
    place = torch.arange(rows.numel()) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    kept = place < limit
    return rows[kept], columns[kept], values[kept]
