"""Metrics by groups of test rows: by the target's events in training, and by the length of the history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from laser_fast.evaluation.metrics import MetricValue, RankingMetrics, rank_values

if TYPE_CHECKING:
    from laser_fast.data import EvaluationRows

_METRICS = ("HR@10", "NDCG@10", "MRR")
_QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, eq=False)
class Group:
    """Some of the rows: `rows` int64 [n], in order."""

    label: str
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def quantile_groups(values: np.ndarray, unit: str) -> list[Group]:
    """Rows in up to four groups of about one size by their values, int64 [B]; equal values stay together.

    `unit` ends the labels, e.g. "1 to 12 events".
    """
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, _QUARTILES, method="inverted_cdf"))
    bucket = np.searchsorted(edges, values, side="left")
    groups = []
    for index in np.unique(bucket):
        rows = np.flatnonzero(bucket == index)
        low, high = int(values[rows].min()), int(values[rows].max())
        groups.append(Group(f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}", rows))
    return groups


def seen_and_cold(rows: EvaluationRows, counts: np.ndarray) -> tuple[Group, Group]:
    """The rows whose target has events in the training part, `counts` int64 [I], and the others, the cold ones."""
    seen = counts[rows.targets] > 0
    return Group("seen", np.flatnonzero(seen)), Group("never", np.flatnonzero(~seen))


def popularity_groups(rows: EvaluationRows, counts: np.ndarray) -> list[Group]:
    """The seen rows by the events of their target, from rare to frequent."""
    seen = seen_and_cold(rows, counts)[0].rows
    groups = quantile_groups(counts[rows.targets[seen]], "events")
    return [Group(group.label, seen[group.rows]) for group in groups]


def group_metric(metrics: RankingMetrics, group: Group, metric: str = "NDCG@10") -> MetricValue:
    """One metric over the rows of a group, with its interval."""
    return MetricValue.from_values(rank_values(metrics.ranks[torch.from_numpy(group.rows)], metric))


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
        "seen in training": seen_and_cold(rows, counts),
        "popularity": popularity_groups(rows, counts),
        "history length": quantile_groups(rows.histories.lengths, "items"),
    }

    def figures(group: Group) -> dict[str, Any]:
        values = {metric: group_metric(metrics, group, metric).to_dict() for metric in _METRICS}
        return {"group": group.label, "rows": len(group), "metrics": values}

    return {name: [figures(group) for group in members] for name, members in groups.items()}


def cold_line(metrics: RankingMetrics, rows: EvaluationRows, counts: np.ndarray, metric: str = "NDCG@10") -> str:
    """One line about the cold rows, beside the others."""
    seen, cold = seen_and_cold(rows, counts)
    if not len(cold):
        return "every target was seen in training"
    return (
        f"targets never seen in training: {metric} {group_metric(metrics, cold, metric)} on {len(cold):,} rows; "
        f"seen: {group_metric(metrics, seen, metric)} on {len(seen):,}"
    )
