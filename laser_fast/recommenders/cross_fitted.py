"""Models beside a recommender, each fitted without the users of one fold, and what was measured of them.

A recommender has seen the targets of its training rows. What reads its states there and those of other histories later
learns from states that are too good: the states of a row's own fold are as good as later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from laser_fast.recommenders.packed_recommender import PackedRecommender

FoldItems = Literal["aligned", "own", "shared"]


@dataclass(eq=False)
class CrossFitted:
    """The models of K folds over the users of a split.

    Attributes:
        models: K recommenders in evaluation mode; `models[k]` has not seen the users of fold k.
        user_folds: int8 [U], fold 0..K-1 of every user of the split.
        items: "shared": all read the item embeddings of the full model; else each has learned its own.
        split_hash: of the split.
        bases: float32 [K, D, D], by which the states of each model are multiplied to lie where the full model's do;
            None = they are left as they are.
    """

    models: list[PackedRecommender]
    user_folds: np.ndarray
    items: FoldItems
    split_hash: str | None
    bases: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.models)

    def states(self, items: torch.Tensor, cu_seqlens: torch.Tensor, fold: int) -> torch.Tensor:
        """Of packed histories, by the model of a fold, in the full model's basis: float32 [N, D]."""
        states = self.models[fold].states(items, cu_seqlens)
        return states if self.bases is None else states @ self.bases[fold]

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """To a device or a dtype, as `nn.Module` does it."""
        for model in self.models:
            model._apply(fn)
        self.bases = None if self.bases is None else fn(self.bases)

    def of_users(self, users: np.ndarray) -> np.ndarray:
        """Fold of each of the users: int64 [B] -> int64 [B].

        Raises:
            ValueError: a user the folds do not know.
        """
        if users.size and not 0 <= users.min() <= users.max() < len(self.user_folds):
            worst = int(users.min() if users.min() < 0 else users.max())
            raise ValueError(f"CrossFitted: users must be in 0..{len(self.user_folds) - 1}, got {worst}")
        folds: np.ndarray = self.user_folds[users].astype(np.int64)
        return folds


def assign_folds(num_users: int, folds: int, seed: int) -> np.ndarray:
    """Fold of every user, `permutation(user) mod folds`: int8 [num_users], sizes differing by at most one."""
    places = np.random.default_rng(seed).permutation(num_users)
    assigned: np.ndarray = (places % folds).astype(np.int8)
    return assigned


def fold_model(model: PackedRecommender, items: FoldItems) -> PackedRecommender:
    """A new model of the kind and sizes of `model`, with random weights from torch's global generator.

    Args:
        items: "shared": its item embeddings are those of `model`, the very same module.
    """
    twin = type(model)(**model.settings)
    if items == "shared":
        twin.item_embedding = model.item_embedding
    twin.split_hash, twin.item_map_hash = model.split_hash, model.item_map_hash
    return twin


@dataclass(frozen=True)
class StateSpread:
    """How the last states of a set of histories lie.

    Attributes:
        norm: mean of their lengths.
        norm_deviation: standard deviation of their lengths.
        alike: mean cosine between the states of two histories of the set.
        to_full: mean cosine between a state and the full model's state of the same history.
    """

    norm: float
    norm_deviation: float
    alike: float
    to_full: float

    @classmethod
    def of(cls, states: torch.Tensor, full: torch.Tensor) -> StateSpread:
        """Of states [B, D] and the full model's of the same histories, B at least 2."""
        norms = states.double().norm(dim=1)
        unit = torch.nn.functional.normalize(states.double(), dim=1)
        other = torch.nn.functional.normalize(full.double(), dim=1)
        count = len(unit)
        alike = (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))
        return cls(float(norms.mean()), float(norms.std()), float(alike), float((unit * other).sum(1).mean()))


@dataclass(frozen=True)
class StateGap:
    """How much better a recommender looks where it has seen the target; NDCG@10, full ranking, None = no such rows.

    Attributes:
        rows: training rows that were ranked, a sample.
        in_sample: the full model on them.
        held_out: for each of them the model of the fold that has not seen its user.
        valid: the full model on the validation rows.
        held_out_valid: for each validation row the model of its user's fold; what the folds lose by their fewer users.
        states: spreads of the states behind these figures, by the same names.
    """

    rows: int
    in_sample: float | None
    held_out: float | None
    valid: float | None
    held_out_valid: float | None
    states: Mapping[str, StateSpread]

    def __str__(self) -> str:
        parts = [f"{_written(self.in_sample)} on {self.rows:,} training rows, whose targets it has seen"]
        if self.held_out is not None:
            parts.append(f"{_written(self.held_out)} of the folds that have not seen these users")
        parts.append(f"{_written(self.valid)} on the validation rows")
        if self.held_out_valid is not None:
            parts.append(f"{_written(self.held_out_valid)} of the folds there")
        return "NDCG@10 " + ", ".join(parts)


def _written(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
