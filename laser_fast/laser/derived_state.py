"""What a `LaserModel` keeps that was made of its weights, and whether it still belongs to them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from laser_fast.laser.kept_prefixes import KeptPrefixes
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.key_value_prefix import KeyValuePrefix
from laser_fast.lm.weights_version import VersionedModule, WeightsVersion
from laser_fast.nn.own_lock import OwnLock
from laser_fast.retrieval.calibration import CalibratedScorer

Self = TypeVar("Self", bound="DerivedState")


class DerivedState(VersionedModule):
    """The item matrix, the calibration and the caches of `LaserModel`, each of one version of the weights.

    A reader of the item matrix or of the calibration refuses one of older weights by name: to make it anew takes long,
    and no request does that unasked. Kept prefixes, instructions and the index are cheap and made anew.

    Args:
        lm: the frozen language model.
        num_items: size of the catalogue I.

    Attributes:
        lm_weights: the version of the weights of the language model alone.
        item_matrix: V, float32 [I, d]; [0, d] until `refresh_items`. To assign one says that it belongs to the weights
            of now.
        calibration: the score that `recommend` ranks by; None = cosine over temperature.
        kept_prefixes: see `keep_prefixes`; None = nothing is kept.
    """

    item_matrix: Tensor

    def __init__(self, lm: FrozenLM, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.lm_weights = WeightsVersion(lm.model)
        self.calibration: CalibratedScorer | None = None
        self.kept_prefixes: KeptPrefixes | None = None
        self._instructions: dict[tuple[tuple[int, ...], torch.dtype | None], tuple[int, KeyValuePrefix]] = {}
        self._making_index = OwnLock()
        self.register_buffer("item_matrix", torch.empty(0, lm.hidden_size), persistent=False)
        self._items_belong_to = 0

    def keep_items(self) -> None:
        """Say that the item matrix, made at other weights, belongs to those of now: only users were trained since.

        To assign a matrix to `item_matrix` says the same.

        Raises:
            RuntimeError: there is no item matrix yet.
        """
        self._any_items()
        self._items_belong_to = self.weights.now()

    def __setattr__(self, name: str, value: Any) -> None:
        """Whoever assigns an item matrix says that it belongs to the weights of now."""
        super().__setattr__(name, value)
        if name == "item_matrix":
            self._items_belong_to = self.weights.now()

    def _all_versions(self) -> tuple[WeightsVersion, ...]:
        return self.weights, self.lm_weights

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Caches that are cheap are made anew where the weights have gone."""
        super()._apply(fn, recurse)
        self._instructions.clear()
        if self.kept_prefixes is not None:
            self.kept_prefixes.store.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the index, which asks this very model for users."""
        return {name: value for name, value in super().__getstate__().items() if name != "_kept_index"}

    @property
    def items_are_outdated(self) -> bool:
        """Whether the item matrix belongs to older weights, see `WeightsVersion`; one that is not there does not."""
        return len(self.item_matrix) > 0 and self._items_belong_to != self.weights.now()

    def current_items(self) -> Tensor:
        """The item matrix V: float32 [I, d].

        Raises:
            RuntimeError: there is none, or it belongs to older weights.
        """
        items = self._any_items()
        if self.items_are_outdated:
            raise RuntimeError(
                "LaserModel: the item matrix must belong to the weights of now, got one of older weights; call "
                "refresh_items() first, or keep_items() where only users were trained since"
            )
        # another thread may have refreshed them in between, and it was that matrix which was asked about
        return items if items is self.item_matrix else self.current_items()

    def refuse_outdated(self) -> None:
        """Make sure that all that is saved beside the weights belongs to them.

        Raises:
            RuntimeError: the item matrix or the calibration belongs to older weights.
        """
        if len(self.item_matrix):
            self.current_items()
        if self.calibration is not None:
            self.calibration.refuse_outdated()

    def _any_items(self) -> Tensor:
        if self.item_matrix.shape[0] != self.num_items:
            raise RuntimeError(
                f"LaserModel: the item matrix must hold {self.num_items} items, got {self.item_matrix.shape[0]}; "
                "call refresh_items() first"
            )
        return self.item_matrix
