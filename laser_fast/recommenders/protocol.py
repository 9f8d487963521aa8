"""The protocol of ID-based recommenders, by which evaluation, fusion and Laser can take any of them."""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.lm.frozen_module import FrozenModule
from laser_fast.lm.uncompiled import uncompiled
from laser_fast.ops.host_copies import on_host, to_device
from laser_fast.ops.segments import check_cu_seqlens, validate_cu_seqlens


@runtime_checkable
class Scorer(Protocol):
    """Anything that gives every catalogue item a score for every history."""

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        ...

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Score of every item for every history; higher is better, nothing is filtered.

        Args:
            items: [N] int64, packed histories, oldest first, values 0..num_items-1.
            cu_seqlens: [B+1] int32; a history may be empty.

        Returns:
            [B, num_items] float32, finite.
        """
        ...


@runtime_checkable
class SequentialRecommender(Scorer, Protocol):
    """A scorer that also has a state after every item of a history."""

    state_size: int
    split_hash: str | None

    def states(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """State after each item, from that item and the older ones of its history: [N, state_size] float32."""
        ...


@runtime_checkable
class CrossFittedRecommender(SequentialRecommender, Protocol):
    """A recommender that also has states of models that have not seen certain users."""

    def fold_states(self, items: Tensor, cu_seqlens: Tensor, fold: int) -> Tensor:
        """`states` of the model that was fitted without the users of this fold."""
        ...


def check_histories(function: str, items: Tensor, cu_seqlens: Tensor, num_items: int) -> None:
    """Check packed histories before anything is looked up with them: items [N] int64, cu_seqlens [B+1] int32.

    Args:
        function: name of the public function, the first word of every message.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape, an item outside 0..num_items-1, or offsets that do not run from 0 to N.
    """
    for name, given in (("items", items), ("cu_seqlens", cu_seqlens)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got a {type(given).__name__}")
    if items.dtype != torch.int64:
        raise TypeError(f"{function}: items must be int64, got {items.dtype}")
    if items.dim() != 1:
        raise ValueError(f"{function}: items must have one dimension, got shape {tuple(items.shape)}")
    check_cu_seqlens(function, cu_seqlens, items.device)
    validate_cu_seqlens(function, on_host(cu_seqlens), items.numel())
    items = on_host(items)
    if items.numel() and (int(items.min()) < 0 or int(items.max()) >= num_items):
        value = int(items[(items < 0) | (items >= num_items)][0])
        raise ValueError(f"{function}: items must be in 0..{num_items - 1}, got {value}; drop unknown items first")


def newest_items(items: Tensor, cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """The last `max_length` items of each packed history: items [M] int64, M <= N, and cu_seqlens [B+1] int32."""
    lengths = cu_seqlens.diff()
    ends = torch.repeat_interleave(cu_seqlens[1:], lengths, output_size=items.numel())
    keep = ends - torch.arange(items.numel(), device=items.device) <= max_length
    kept = F.pad(lengths.clamp_max(max_length).cumsum(0), (1, 0)).to(torch.int32)
    return items[keep], kept


class FrozenRecommender(FrozenModule):
    """An ID-based recommender that is read and not trained."""

    def __init__(self, recommender: SequentialRecommender) -> None:
        super().__init__()
        self.recommender = recommender
        self.freeze()

    @uncompiled
    @torch.no_grad()
    def states(self, items: Tensor, cu_seqlens: Tensor, folds: Tensor | None = None) -> Tensor:
        """States without gradient: items [N], cu_seqlens [B+1] -> float32 [N, D_id].

        Args:
            folds: int64 [B], the fold whose states each history gets, -1 for the model that has seen all users;
                None for -1 everywhere.
        """
        if folds is None or not bool((on_host(folds) >= 0).any()):
            return self.recommender.states(items, cu_seqlens)
        if not isinstance(self.recommender, CrossFittedRecommender):
            raise ValueError(
                f"FrozenRecommender: the recommender must have fold_states for rows with a fold, got a "
                f"{type(self.recommender).__name__} without"
            )
        # sorted on the host, which knows all three tensors in training
        folds, lengths, host_items = on_host(folds), on_host(cu_seqlens).diff(), on_host(items)
        fold_of_item = torch.repeat_interleave(folds, lengths, output_size=items.numel())
        parts = []
        for fold in folds.unique().tolist():
            part = F.pad(lengths[folds == fold].cumsum(0), (1, 0)).to(torch.int32)
            own = to_device(host_items[fold_of_item == fold], items.device), to_device(part, items.device)
            read = self.recommender
            parts.append(read.states(*own) if fold < 0 else read.fold_states(*own, fold))
        states = torch.cat(parts)
        places = to_device(fold_of_item.argsort(stable=True), items.device)
        return torch.empty_like(states).index_copy_(0, places, states)


def repeat_positions(items: Tensor, cu_seqlens: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Places b * I + i, int64, of the distinct items of packed histories in [B, I] scores, and of the last items."""
    lengths = cu_seqlens.long().diff()
    places = torch.repeat_interleave(lengths, output_size=items.numel()) * num_items + items
    return torch.unique(places), places[cu_seqlens[1:].long()[lengths > 0] - 1]
