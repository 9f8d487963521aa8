"""Several runs of one configuration with other seeds: what they agree on, and how far they lie apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from laser_fast.evaluation.metrics import RankingMetrics, aligned


@dataclass(frozen=True)
class SeedSpread:
    """One metric over n runs: mean of their means, sample deviation of their means (NaN for one run)."""

    mean: float
    deviation: float
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.deviation) else f"{self.mean:.4f} (sd {self.deviation:.4f})"

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain numbers; what is not defined is None."""
        numbers = {"mean": self.mean, "deviation": self.deviation}
        return {name: None if math.isnan(value) else value for name, value in numbers.items()} | {"runs": self.runs}


def across_seeds(runs: Sequence[RankingMetrics]) -> dict[str, SeedSpread]:
    """Spread of every metric over runs on the same rows.

    Raises:
        ValueError: no run, or runs with other rows or metrics.
    """
    if not runs:
        raise ValueError("across_seeds: at least one run is needed, got none")
    shapes = {(len(run), tuple(run.values)) for run in runs}
    if len(shapes) > 1:
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


def spread_table(spreads: Mapping[str, Mapping[str, SeedSpread]], metrics: Sequence[str] | None = None) -> str:
    """Aligned text: a line per system, a column per metric (default: those of the first)."""
    if not spreads:
        return ""
    columns = list(metrics) if metrics is not None else list(next(iter(spreads.values())))
    return aligned(
        [["", *columns], *([name, *(str(spread[column]) for column in columns)] for name, spread in spreads.items())]
    )
