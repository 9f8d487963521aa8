"""What all recommenders of this package share: states of packed histories, and scores from the newest state."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from laser_fast.lm.weights_version import VersionedModule
from laser_fast.nn.dtypes import refuse_dtypes
from laser_fast.nn.evaluation_mode import evaluating, refuse_torch_modes
from laser_fast.ops.precision import autocast_off
from laser_fast.ops.segments import lengths_on_host
from laser_fast.recommenders.cross_fitted import CrossFitted, StateGap
from laser_fast.recommenders.protocol import check_histories, newest_items

Self = TypeVar("Self", bound="PackedRecommender")


class PackedRecommender(VersionedModule):
    """Base of the recommenders that are trained, imported, saved and loaded here; satisfies `SequentialRecommender`.

    A subclass defines `forward`, which gives a state after every item from that item and the older ones of its own
    history, and has `item_embedding`. It draws dropout where `draws_dropout` says so, which is not while requests are
    answered. Its arguments, by name, are `settings`.

    Attributes:
        kind: its name in files and configurations.
        num_items: I, size of the catalogue.
        state_size: width of the states.
        max_length: longest history, in items.
        split_hash: hash of the split whose training part it was fitted on; None before training, or if unknown.
        item_map_hash: hash of the item table whose indices it knows, where that was recorded.
        settings: the arguments it was built with.
        cross_fitted: models beside it that have not seen certain users; no part of its `state_dict`. None = there are
            none.
        gap: what was measured of its states where it has seen the target and where not; None = nothing.
    """

    kind: ClassVar[str]
    item_embedding: nn.Embedding

    def __init__(self, state_size: int, settings: dict[str, Any]) -> None:
        """Record the sizes.

        Args:
            state_size: width of the states.
            settings: the arguments of the subclass; `num_items` and `max_length` among them.

        Raises:
            ValueError: a size of `settings` below 1.
        """
        super().__init__()
        for name, size in settings.items():
            if (name.startswith(("num_", "max_")) or name.endswith("width")) and size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {size}")
        self.num_items: int = settings["num_items"]
        self.max_length: int = settings["max_length"]
        self.state_size = state_size
        self.split_hash: str | None = None
        self.item_map_hash: str | None = None
        self.settings = settings
        self.cross_fitted: CrossFitted | None = None
        self.gap: StateGap | None = None

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """What `logits` multiplies states with, [I, state_size], and adds, [I]: the item embeddings, and nothing."""
        return self.item_embedding.weight, None

    def logits(self, states: Tensor) -> Tensor:
        """[N, state_size] -> [N, I]: inner products with every row of `output_layer`."""
        weight, bias = self.output_layer()
        logits = states @ weight.T
        return logits if bias is None else logits + bias

    def states(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """State after each item, without dropout, gradient or autocast; the module's mode stays as it is.

        Args:
            items: [N] int64, packed histories, oldest first, each at most `max_length` long.
            cu_seqlens: [B+1] int32; histories may be empty.

        Returns:
            [N, state_size] float32.

        Raises:
            TypeError, ValueError: see `check_histories`; ValueError also for a history longer than `max_length`.
            RuntimeError: in training mode, a module of torch that acts otherwise in it (dropout, batch norm).
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
        """`states` of the model that was fitted without the users of this fold, brought into this model's basis.

        Raises:
            TypeError, ValueError: as `states`; ValueError also for a fold that does not exist.
        """
        number = 0 if self.cross_fitted is None else len(self.cross_fitted)
        if self.cross_fitted is None or not 0 <= fold < number:
            raise ValueError(f"{type(self).__name__}.fold_states: fold must be one of {number}, got {fold}")
        with autocast_off(items.device):
            return self.cross_fitted.states(items, cu_seqlens, fold)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To a device, float32 or float64, and the folds along.

        Raises:
            TypeError: to half precision: who reads its states expects float32.
        """
        exact = (torch.float32, torch.float64)
        refuse_dtypes(self, fn, "its states are read in float32; leave it as it is", allowed=exact)
        if self.cross_fitted is not None:
            self.cross_fitted.move(fn)
        return super()._apply(fn, recurse)

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Next-item logits from the newest `max_length` items of each history; an empty history scores 0 everywhere.

        Args:
            items: [N] int64, packed histories, oldest first, of any length.
            cu_seqlens: [B+1] int32; histories may be empty.

        Returns:
            [B, num_items] float32.

        Raises:
            TypeError, ValueError: see `check_histories`.
        """
        check_histories(f"{type(self).__name__}.score", items, cu_seqlens, self.num_items)
        last, filled = self.last_states(items, cu_seqlens)
        with torch.no_grad(), autocast_off(items.device):
            return self.logits(last).masked_fill_(~filled[:, None], 0.0)

    def last_states(self, items: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """State after the newest item of each history, read from its newest `max_length` items.

        Args:
            items: [N] int64, packed histories, oldest first, of any length.
            cu_seqlens: [B+1] int32; histories may be empty.

        Returns:
            (states [B, state_size] float32, 0 for an empty history; bool [B], whether a history has items).
        """
        items, cu_seqlens = newest_items(items, cu_seqlens, self.max_length)
        states = self.states(items, cu_seqlens)
        last = states.new_zeros(cu_seqlens.numel() - 1, self.state_size)
        filled = cu_seqlens.diff() > 0
        last[filled] = states[cu_seqlens[1:][filled].long() - 1]
        return last, filled
