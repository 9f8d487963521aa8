"""Counting baselines without settings, on the CPU: Popularity and a first-order Markov chain; each is a `Scorer`."""

from __future__ import annotations

import torch
from torch import Tensor

from laser_fast.recommenders.item_to_item import Array, ItemToItem, entries_by_row, followers, packed_histories
from laser_fast.recommenders.protocol import check_histories


class Popularity:
    """score_i = counts_i, the number of events of item i in the fitted sequences, for every history."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts.float().cpu()
        self.num_items = counts.numel()

    @classmethod
    def fit(cls, items: Array, cu_seqlens: Array, num_items: int) -> Popularity:
        """Count the events of packed sequences (items [N] int64, cu_seqlens [B+1] int32)."""
        items, cu_seqlens = packed_histories("Popularity.fit", items, cu_seqlens, num_items)
        return cls(torch.bincount(items, minlength=num_items))

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`."""
        check_histories("Popularity.score", items, cu_seqlens, self.num_items)
        return self.counts.to(items.device).expand(cu_seqlens.numel() - 1, -1).clone()


class Markov1:
    """score_i = |{transitions last -> i}| + count_i / (1 + max count), over directly consecutive events.

    The second term is below 1: popularity decides among items that followed the last item equally often.
    """

    def __init__(self, transitions: ItemToItem, counts: Tensor) -> None:
        self._transitions = transitions
        self._popularity = counts.float() / (1.0 + counts.max().float())
        self.num_items = counts.numel()

    @classmethod
    def fit(cls, items: Array, cu_seqlens: Array, num_items: int) -> Markov1:
        """Count the transitions of packed sequences (items [N] int64, cu_seqlens [B+1] int32)."""
        items, cu_seqlens = packed_histories("Markov1.fit", items, cu_seqlens, num_items)
        end = torch.repeat_interleave(cu_seqlens[1:].long(), cu_seqlens.long().diff(), output_size=items.numel())
        last, following, times = followers(items, end, torch.arange(items.numel()), max_gap=1)
        table = entries_by_row([(last, following, times.float())], num_items)
        return cls(ItemToItem(*table, decay=1.0, max_history=1), torch.bincount(items, minlength=num_items))

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`."""
        check_histories("Markov1.score", items, cu_seqlens, self.num_items)
        return self._transitions.score(items, cu_seqlens).add_(self._popularity.to(items.device))
