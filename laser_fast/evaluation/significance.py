"""Uncertainty of figures: bootstrap intervals, paired tests of two systems, spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from laser_fast.evaluation.metrics import RankingMetrics, or_none, rank_values

_LEVEL = 0.95  # of the intervals
_MAX_DRAWS = 2**24  # random numbers held at a time
_MOST_RESAMPLES = 10**7


def bootstrap_interval(values: Tensor, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` [B] over resamples of the rows; NaN for no rows.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if not 1 <= resamples <= _MOST_RESAMPLES:
        raise ValueError(f"bootstrap_interval: resamples must be from 1 to {_MOST_RESAMPLES:,}, got {resamples}")
    if not values.numel():
        return float("nan"), float("nan")
    exact = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = []
    for count in _pieces(resamples, exact.numel()):
        rows = torch.randint(exact.numel(), (count, exact.numel()), generator=generator)
        means.append(exact[rows].mean(dim=1))
    tails = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), tails).tolist()
    return low, high


@dataclass(frozen=True)
class Significance:
    """How two systems differ on one metric over the same rows."""

    metric: str
    difference: float  # mean of a - b
    low: float  # to `high`: 95% bootstrap interval of the difference over rows
    high: float
    p_value: float  # two-sided, of the paired permutation test
    rows: int

    def __str__(self) -> str:
        return f"{self.metric} {self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}], p = {self.p_value:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def paired_significance(
    ranks_a: Tensor, ranks_b: Tensor, metric: str = "NDCG@10", *, resamples: int = 10_000, seed: int = 0
) -> Significance:
    """Difference of two systems with a paired permutation test.

    p is the share of random signs of the rows' differences whose mean is at least as far from 0. The observed signs
    count as one draw, so p is at least 1 / (resamples + 1).

    Args:
        ranks_a, ranks_b: [B] int64, ranks of the same targets.
        metric: as in `rank_values`.
        resamples: random signs, and as many bootstrap resamples.

    Source: Smucker, Allan & Carterette, CIKM 2007 (the randomization test).
    """
    if ranks_a.shape != ranks_b.shape or not ranks_a.numel():
        raise ValueError(
            "paired_significance: both systems must have ranked the same rows, at least one, "
            f"got {tuple(ranks_a.shape)} and {tuple(ranks_b.shape)} ranks"
        )
    differences = (rank_values(ranks_a, metric) - rank_values(ranks_b, metric)).cpu()
    low, high = bootstrap_interval(differences, resamples=resamples, seed=seed)
    observed = differences.sum().abs().item()
    # sums of the same numbers in another order differ in the last digits: these are ties
    reached = observed - 1e-9 * max(1.0, differences.abs().sum().item())
    changed = differences[differences != 0]
    generator = torch.Generator().manual_seed(seed)
    as_far = 0
    for count in _pieces(resamples, changed.numel()):
        signs = torch.randint(2, (count, changed.numel()), generator=generator, dtype=torch.int8).double() * 2 - 1
        as_far += int(((signs @ changed).abs() >= reached).sum())
    p_value = (1 + as_far) / (1 + resamples)
    return Significance(metric, differences.mean().item(), low, high, p_value, differences.numel())


def _pieces(resamples: int, rows: int) -> list[int]:
    """How many resamples of so many rows are drawn at a time."""
    step = max(1, _MAX_DRAWS // max(1, rows))
    return [min(step, resamples - start) for start in range(0, resamples, step)]


@dataclass(frozen=True)
class SeedSpread:
    """One metric over n runs: mean of their means, sample deviation of their means (NaN for one run)."""

    mean: float
    deviation: float
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.deviation) else f"{self.mean:.4f} (sd {self.deviation:.4f})"

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain numbers; None for NaN."""
        return {"mean": or_none(self.mean), "deviation": or_none(self.deviation), "runs": self.runs}


def across_seeds(runs: Sequence[RankingMetrics]) -> dict[str, SeedSpread]:
    """Spread of every metric over runs of one configuration on the same rows."""
    if not runs:
        raise ValueError("across_seeds: at least one run is needed, got none")
    if len({(len(run), tuple(run.values)) for run in runs}) > 1:
        raise ValueError(
            f"across_seeds: runs must have the same rows and metrics, got {sorted(len(run) for run in runs)} rows and "
            f"{sorted({len(run.values) for run in runs})} metrics"
        )
    spread = {}
    for name in runs[0].values:
        means = [run[name].mean for run in runs]
        mean = math.fsum(means) / len(means)
        squares = math.fsum((value - mean) ** 2 for value in means)
        deviation = math.sqrt(squares / (len(means) - 1)) if len(means) > 1 else math.nan
        spread[name] = SeedSpread(mean, deviation, len(means))
    return spread
