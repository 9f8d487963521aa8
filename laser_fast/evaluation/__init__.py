"""Evaluation: ranks over the whole catalogue, metrics with confidence intervals, paired comparisons."""

from laser_fast.evaluation.calibration import fit_calibration, search_calibration
from laser_fast.evaluation.evaluate import evaluate, row_batches
from laser_fast.evaluation.metrics import (
    MetricValue,
    RankingMetrics,
    paired_difference,
    rank_values,
    table,
    target_ranks,
)

__all__ = [
    "MetricValue",
    "RankingMetrics",
    "evaluate",
    "fit_calibration",
    "paired_difference",
    "rank_values",
    "row_batches",
    "search_calibration",
    "table",
    "target_ranks",
]
