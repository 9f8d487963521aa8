"""What was measured of a recommender's states: how good they rank, and how they lie, on seen and on unseen rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


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
        """The spread of states [B, D] beside the full model's of the same histories, B at least 2."""
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
