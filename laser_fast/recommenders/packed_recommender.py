"""What all recommenders of this package share: states of packed histories, and scores from the newest state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from laser_fast.lm.weights_version import VersionedModule
from laser_fast.nn.dtypes import refuse_dtypes
from laser_fast.nn.evaluation_mode import evaluating, refuse_torch_modes
from laser_fast.ops.precision import autocast_off
from laser_fast.ops.segments import lengths_on_host
from laser_fast.recommenders.protocol import check_histories, newest_items
from laser_fast.recommenders.state_spread import StateGap

Self = TypeVar("Self", bound="PackedRecommender")


class PackedRecommender(VersionedModule):
    """Base of the recommenders that are trained, imported, saved and loaded here; a `SequentialRecommender`.

    A subclass defines `item_embedding` and `forward(items [N] int64, cu_seqlens [B+1] int32)`, which gives a state
    after every item from that item and the older ones of its own history: [N, state_size] float32, with gradient.
    Histories are packed, oldest item first, at most `max_length` long. `forward` draws dropout where `draws_dropout`
    says so. The arguments of a subclass, by name, are `settings`.

    Attributes:
        kind: name in files and configurations.
        num_items: I.
        max_length: longest history, in items.
        split_hash: of the split on whose training part it was fitted; None if unknown.
        item_map_hash: of its item table; None if unknown.
        cross_fitted: models beside it that have not seen certain users; no part of its `state_dict`.
        gap: measured of its states where it has and has not seen the target.
    """

    kind: ClassVar[str]
    item_embedding: nn.Embedding

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Check and keep the arguments of a subclass, which passes its `locals()`."""
        super().__init__()
        settings = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        for name, size in settings.items():
            if (name.startswith(("num_", "max_")) or name.endswith("width")) and size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {size}")
        width, num_heads = settings["width"], settings.get("num_heads", 1)
        if width % num_heads:
            name = type(self).__name__
            raise ValueError(f"{name}: width must be a multiple of num_heads, got {width} and {num_heads}")
        self.num_items: int = settings["num_items"]
        self.max_length: int = settings["max_length"]
        self.state_size: int = width
        self.split_hash: str | None = None
        self.item_map_hash: str | None = None
        self.settings = settings
        self.cross_fitted: CrossFitted | None = None
        self.gap: StateGap | None = None

    def twin(self: Self) -> Self:
        """A new model with these settings, and random weights from torch's global generator."""
        twin = type(self)(**self.settings)
        twin.split_hash, twin.item_map_hash = self.split_hash, self.item_map_hash
        return twin

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight [I, state_size] and bias [I] of `logits`: here the item embeddings, and None."""
        return self.item_embedding.weight, None

    def logits(self, states: Tensor) -> Tensor:
        """Scores of all items: states [N, state_size] -> [N, I]."""
        weight, bias = self.output_layer()
        logits = states @ weight.T
        return logits if bias is None else logits + bias

    def states(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`SequentialRecommender.states`, without dropout, gradient or autocast, whatever the module's mode.

        Raises:
            TypeError, ValueError: see `check_histories`; ValueError also for a history longer than `max_length`.
            RuntimeError: see `refuse_torch_modes`.
        """
        name = type(self).__name__
        check_histories(f"{name}.states", items, cu_seqlens, self.num_items)
        longest = max(lengths_on_host(cu_seqlens), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"{name}.states: histories must have at most {self.max_length} items, got {longest}; "
                "keep the newest ones"
            )
        if self.training:
            refuse_torch_modes(name, self)
        with torch.no_grad(), evaluating(), autocast_off(items.device):
            states: Tensor = self(items, cu_seqlens)
        return states

    def fold_states(self, items: Tensor, cu_seqlens: Tensor, fold: int) -> Tensor:
        """`states` of the model that was fitted without the users of this fold, in this model's basis."""
        number = 0 if self.cross_fitted is None else len(self.cross_fitted)
        if self.cross_fitted is None or not 0 <= fold < number:
            raise ValueError(f"{type(self).__name__}.fold_states: fold must be one of {number}, got {fold}")
        bases = self.cross_fitted.bases
        with autocast_off(items.device):
            states = self.cross_fitted.models[fold].states(items, cu_seqlens)
            return states if bases is None else states @ bases[fold]

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the folds as well, and refuse half precision: readers of the states expect float32."""
        exact = (torch.float32, torch.float64)
        refuse_dtypes(self, fn, "its states are read in float32; leave it as it is", allowed=exact)
        if (folds := self.cross_fitted) is not None:
            for model in folds.models:
                model._apply(fn)
            folds.bases = None if folds.bases is None else fn(folds.bases)
        return super()._apply(fn, recurse)

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`: logits from the newest `max_length` items; an empty history scores 0 everywhere."""
        check_histories(f"{type(self).__name__}.score", items, cu_seqlens, self.num_items)
        last, filled = self.last_states(items, cu_seqlens)
        with torch.no_grad(), autocast_off(items.device):
            return self.logits(last).masked_fill_(~filled[:, None], 0.0)

    def last_states(self, items: Tensor, cu_seqlens: Tensor, fold: int | None = None) -> tuple[Tensor, Tensor]:
        """State after each history, from its newest `max_length` items.

        Args:
            items: [N] int64, packed histories of any length, oldest first.
            cu_seqlens: [B+1] int32.
            fold: whose states (`fold_states`); None for this model's.

        Returns:
            (states float32 [B, state_size], 0 for an empty history; bool [B], whether a history has items).
        """
        items, cu_seqlens = newest_items(items, cu_seqlens, self.max_length)
        states = self.states(items, cu_seqlens) if fold is None else self.fold_states(items, cu_seqlens, fold)
        last = states.new_zeros(cu_seqlens.numel() - 1, self.state_size)
        filled = cu_seqlens.diff() > 0
        last[filled] = states[cu_seqlens[1:][filled].long() - 1]
        return last, filled


@dataclass(eq=False)
class CrossFitted:
    """The models of K folds over the users of a split, beside a recommender that was fitted on all users.

    A recommender has seen the targets of its training rows, so its states there are too good to learn from. The states
    of a row's own fold are as good as those of new histories.

    Attributes:
        models: K recommenders in evaluation mode; `models[k]` has not seen the users of fold k.
        user_folds: int8 [U], fold 0..K-1 of every user of the split.
        bases: float32 [K, D, D], maps of the states of each model to the full model's basis; None for the identity.
    """

    models: list[PackedRecommender]
    user_folds: np.ndarray
    split_hash: str | None
    bases: Tensor | None

    def __len__(self) -> int:
        return len(self.models)

    def of_users(self, users: np.ndarray) -> np.ndarray:
        """Fold of each user: int64 [B] -> int64 [B]."""
        if users.size and not 0 <= users.min() <= users.max() < len(self.user_folds):
            worst = int(users.min() if users.min() < 0 else users.max())
            raise ValueError(f"CrossFitted: users must be in 0..{len(self.user_folds) - 1}, got {worst}")
        return self.user_folds[users].astype(np.int64)


def assign_folds(num_users: int, folds: int, seed: int) -> np.ndarray:
    """Fold of every user, `permutation(user) mod folds`: int8 [num_users], sizes differing by at most one."""
    places = np.random.default_rng(seed).permutation(num_users)
    return (places % folds).astype(np.int8)
