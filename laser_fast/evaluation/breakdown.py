"""Figures of groups of rows as plain numbers: items never seen in training apart, popularity, length of the history."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from laser_fast.evaluation.groups import Group, group_metric, popularity_groups, quantile_groups
from laser_fast.evaluation.metrics import RankingMetrics

if TYPE_CHECKING:
    from laser_fast.data import EvaluationRows

_METRICS = ("HR@10", "NDCG@10", "MRR")


def group_figures(metrics: RankingMetrics, rows: EvaluationRows, counts: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """HR@10, NDCG@10 and MRR of one system for the cold and the warm rows, by popularity and by length of the history.

    Args:
        metrics: of a ranking of the whole catalogue, in the order of `rows`.
        rows: B rows.
        counts: int64 [I], events of each item in the training part; a target with 0 is cold.

    Returns:
        "seen in training", "popularity" and "history length": one entry a group, with its label, rows and metrics.

    Raises:
        ValueError: metrics of another number of rows.
    """
    if metrics.ranks.shape != rows.targets.shape:
        raise ValueError(f"group_figures: metrics must be of {len(rows)} rows, got {tuple(metrics.ranks.shape)} ranks")
    warm, cold = popularity_groups(rows.targets, counts)
    seen = Group("seen", np.flatnonzero(counts[rows.targets] > 0))
    groups = {
        "seen in training": [seen, cold],
        "popularity": warm,
        "history length": quantile_groups(rows.histories.lengths, "items"),
    }
    return {
        name: [
            {
                "group": group.label,
                "rows": len(group),
                "metrics": {metric: group_metric(metrics, group, metric).to_dict() for metric in _METRICS},
            }
            for group in members
        ]
        for name, members in groups.items()
    }


def cold_line(metrics: RankingMetrics, rows: EvaluationRows, counts: np.ndarray, metric: str = "NDCG@10") -> str:
    """One line about the rows whose target no training sequence holds, beside the others."""
    cold = Group("never", np.flatnonzero(counts[rows.targets] == 0))
    if not len(cold):
        return "every target was seen in training"
    seen = Group("seen", np.flatnonzero(counts[rows.targets] > 0))
    return (
        f"targets never seen in training: {metric} {group_metric(metrics, cold, metric)} on {len(cold):,} rows; "
        f"seen: {group_metric(metrics, seen, metric)} on {len(seen):,}"
    )
