"""Sampled rankings: every target among a few drawn candidates, under names that no full ranking has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laser_fast.evaluation.candidates import Candidates
from laser_fast.evaluation.evaluate import row_batches
from laser_fast.evaluation.metrics import MetricValue, RankingMetrics, rank_values, target_ranks
from laser_fast.recommenders.protocol import Scorer

if TYPE_CHECKING:
    from laser_fast.data import EvaluationRows


@dataclass(frozen=True)
class DrawnValue(MetricValue):
    """A metric averaged over the draws of each row, then over rows.

    Attributes:
        standard_error: over rows, of their means over the draws.
        draw_error: over draws: what another set of D draws would change; NaN for one draw.
        draw_deviation: sample deviation of the figure of a single draw; NaN for one draw.
    """

    draw_error: float
    draw_deviation: float

    @classmethod
    def from_draws(cls, values: Tensor) -> DrawnValue:
        """From the value of every draw and row, [D, B]."""
        over_rows = MetricValue.from_values(values.mean(dim=0))
        draws = values.shape[0]
        deviation = values.mean(dim=1).std().item() if draws > 1 else math.nan
        return cls(over_rows.mean, over_rows.standard_error, deviation / math.sqrt(draws), deviation)

    def to_dict(self) -> dict[str, float | None]:
        """As `MetricValue.to_dict`, with what concerns the draws."""
        numbers = {"draw_error": self.draw_error, "draw_deviation": self.draw_deviation}
        return super().to_dict() | {name: None if math.isnan(number) else number for name, number in numbers.items()}


@dataclass(frozen=True)
class SampledMetrics(RankingMetrics):
    """Metrics of rankings among C candidates; names end in "|sampledC" or "|popularityC", `ranks` is [D, B]."""

    @classmethod
    def from_draws(cls, ranks: Tensor, suffix: str, num_candidates: int, ks: Sequence[int]) -> SampledMetrics:
        """Metrics of ranks [D, B] int64; cut-offs that every ranking would pass are left out."""
        useful = [k for k in ks if k < num_candidates]
        names = [f"HR@{k}" for k in useful] + [f"NDCG@{k}" for k in useful] + ["MRR"]
        return cls({name + suffix: DrawnValue.from_draws(rank_values(ranks, name)) for name in names}, ranks)

    def __len__(self) -> int:
        """Number of rows."""
        return self.ranks.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """As `RankingMetrics.to_dict`, with the number of draws."""
        return super().to_dict() | {"draws": self.ranks.shape[0]}


@torch.no_grad()
def evaluate_candidates(
    scorer: Scorer,
    rows: EvaluationRows,
    candidates: Candidates,
    *,
    ks: Sequence[int] = (1, 5, 10, 20),
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> SampledMetrics:
    """Rank each row's target among its candidates, in every draw; ties count against the target.

    Args:
        scorer: gives [b, I] scores for b packed histories, once per row.
        rows: B rows.
        candidates: drawn for these rows.
        ks: cut-offs; those of C and above are left out, every ranking would pass them.
        batch_size: rows scored at a time.
        device: where the histories are put before `scorer.score`.

    Raises:
        ValueError: candidates of other rows, a cut-off below 1, or a scorer that returns NaN or a wrong shape.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"evaluate_candidates: ks must be at least 1, got {tuple(ks)}")
    candidates.check_rows(rows, scorer.num_items)
    drawn, num_candidates = torch.tensor(candidates.items), candidates.items.shape[2]
    ranks, start = torch.empty(drawn.shape[:2], dtype=torch.int64), 0
    for items, cu_seqlens, targets in row_batches(rows, batch_size, device):
        scores = scorer.score(items, cu_seqlens).cpu()
        if scores.shape != (len(targets), scorer.num_items):
            raise ValueError(
                f"evaluate_candidates: score must return shape {(len(targets), scorer.num_items)}, "
                f"got {tuple(scores.shape)}"
            )
        if bool(torch.isnan(scores).any()):
            raise ValueError(f"evaluate_candidates: scores must not be NaN, got NaN in rows from {start} on")
        stop = start + len(targets)
        for draw in range(drawn.shape[0]):
            chosen = scores.gather(1, drawn[draw, start:stop])
            ranks[draw, start:stop] = target_ranks(chosen, torch.zeros(len(targets), dtype=torch.int64))
        start = stop
    return SampledMetrics.from_draws(ranks, candidates.suffix, num_candidates, ks)
