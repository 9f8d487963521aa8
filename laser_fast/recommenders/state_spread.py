"""Measurements of a recommender's states on seen and on unseen rows: how well they rank, and how they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StateSpread:
    """How the last states of a set of histories lie."""

    norm: float  # mean length
    norm_deviation: float  # standard deviation of the lengths
    alike: float  # mean cosine between the states of two histories
    to_full: float  # mean cosine between a state and the full model's state of the same history

    @classmethod
    def of(cls, states: torch.Tensor, full: torch.Tensor) -> StateSpread:
        """The spread of states [B, D] beside the full model's states, B >= 2."""
        norms, count = states.double().norm(dim=1), len(states)
        unit, other = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (states, full))
        alike = (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))
        return cls(float(norms.mean()), float(norms.std()), float(alike), float((unit * other).sum(1).mean()))


@dataclass(frozen=True)
class StateGap:
    """NDCG@10 of a recommender in the full ranking, where it has and has not seen the target; None for no rows."""

    rows: int  # a sample of the training rows
    in_sample: float | None  # the full model on the sample
    held_out: float | None  # on the sample, for each row the model of the fold that has not seen its user
    valid: float | None  # the full model on the validation rows
    held_out_valid: float | None  # on the validation rows, for each the model of its user's fold
    states: Mapping[str, StateSpread]  # the states behind these figures, by the same names

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
