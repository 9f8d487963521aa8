"""Metrics by groups of test rows: by the target's events in training, and by the length of the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from laser_fast.evaluation.metrics import MetricValue, RankingMetrics, rank_values

if TYPE_CHECKING:
    from laser_fast.data import EvaluationRows

_METRICS = ("HR@10", "NDCG@10", "MRR")


@dataclass(frozen=True, eq=False)
class Group:
    """Some of the rows: `rows` int64 [n], in order."""

    label: str
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def quantile_groups(values: np.ndarray, unit: str, num_groups: int = 4) -> list[Group]:
    """Rows in at most `num_groups` groups of about one size by their values, int64 [B]; equal values stay together.

    `unit` ends the labels, e.g. "1 to 12 events".
    """
    if num_groups < 1:
        raise ValueError(f"quantile_groups: num_groups must be at least 1, got {num_groups}")
    if not len(values):
        return []
    inner = np.linspace(0, 1, num_groups + 1)[1:-1]
    edges = np.unique(np.quantile(values, inner, method="inverted_cdf")) if len(inner) else np.zeros(0)
    bucket = np.searchsorted(edges, values, side="left")
    groups = []
    for index in np.unique(bucket):
        rows = np.flatnonzero(bucket == index)
        low, high = int(values[rows].min()), int(values[rows].max())
        groups.append(Group(f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}", rows))
    return groups


def popularity_groups(targets: np.ndarray, counts: np.ndarray, num_groups: int = 4) -> tuple[list[Group], Group]:
    """Rows by the events of their target: groups from rare to frequent, and the cold rows, whose target has none.

    Args:
        targets: int64 [B], item of each row.
        counts: int64 [I], events of each item in the training part.
    """
    seen = counts[targets]
    warm = np.flatnonzero(seen > 0)
    groups = [Group(g.label, warm[g.rows]) for g in quantile_groups(seen[warm], "events", num_groups)]
    return groups, Group("never", np.flatnonzero(seen == 0))


def group_metric(metrics: RankingMetrics, group: Group, metric: str = "NDCG@10") -> MetricValue:
    """One metric over the rows of a group, with its interval."""
    return MetricValue.from_values(rank_values(metrics.ranks[torch.from_numpy(group.rows)], metric))


def group_table(
    groups: Sequence[Group], systems: Mapping[str, RankingMetrics], metric: str = "NDCG@10"
) -> list[list[MetricValue]]:
    """`group_metric` for every group (rows) and system (columns)."""
    return [[group_metric(metrics, group, metric) for metrics in systems.values()] for group in groups]


def group_figures(metrics: RankingMetrics, rows: EvaluationRows, counts: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """HR@10, NDCG@10 and MRR of one system by "seen in training", "popularity" and "history length".

    Args:
        metrics: of a full ranking, in the order of `rows`.
        rows: B rows.
        counts: int64 [I], events of each item in the training part; a target with 0 is cold.

    Returns:
        An entry for each group, with its label, number of rows and metrics.
    """
    if metrics.ranks.shape != rows.targets.shape:
        raise ValueError(f"group_figures: metrics must be of {len(rows)} rows, got {tuple(metrics.ranks.shape)} ranks")
    groups = {
        "seen in training": _seen_and_cold(rows, counts),
        "popularity": popularity_groups(rows.targets, counts)[0],
        "history length": quantile_groups(rows.histories.lengths, "items"),
    }

    def figures(group: Group) -> dict[str, Any]:
        values = {metric: group_metric(metrics, group, metric).to_dict() for metric in _METRICS}
        return {"group": group.label, "rows": len(group), "metrics": values}

    return {name: [figures(group) for group in members] for name, members in groups.items()}


def cold_line(metrics: RankingMetrics, rows: EvaluationRows, counts: np.ndarray, metric: str = "NDCG@10") -> str:
    """One line about the cold rows, beside the others."""
    seen, cold = _seen_and_cold(rows, counts)
    if not len(cold):
        return "every target was seen in training"
    return (
        f"targets never seen in training: {metric} {group_metric(metrics, cold, metric)} on {len(cold):,} rows; "
        f"seen: {group_metric(metrics, seen, metric)} on {len(seen):,}"
    )


def _seen_and_cold(rows: EvaluationRows, counts: np.ndarray) -> tuple[Group, Group]:
    seen = counts[rows.targets] > 0
    return Group("seen", np.flatnonzero(seen)), Group("never", np.flatnonzero(~seen))
