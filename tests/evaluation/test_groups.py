"""Groups of test rows: about equally large, equal numbers together, cold items apart."""

import numpy as np
import pytest
import torch

from laser_fast.data import EvaluationRows, PackedSequences
from laser_fast.evaluation import cold_line, group_figures
from laser_fast.evaluation.groups import Group, group_metric, popularity_groups, quantile_groups, seen_and_cold
from laser_fast.evaluation.metrics import RankingMetrics


def test_quantile_groups_are_equal_in_size_and_keep_ties_together() -> None:
    groups = quantile_groups(np.arange(1, 101), "items")
    assert [group.label for group in groups] == ["1 to 25 items", "26 to 50 items", "51 to 75 items", "76 to 100 items"]
    assert [len(group) for group in groups] == [25, 25, 25, 25]
    tied = quantile_groups(np.array([3] * 9 + [1200]), "events")
    assert [(group.label, len(group)) for group in tied] == [("3 events", 9), ("1,200 events", 1)]
    assert quantile_groups(np.zeros(0, dtype=np.int64), "items") == []
    rows = np.concatenate([group.rows for group in groups])
    assert sorted(rows.tolist()) == list(range(100))


def test_popularity_is_that_of_the_target_and_cold_rows_stand_apart() -> None:
    counts = np.array([0, 5, 50, 500])
    rows = EvaluationRows(np.arange(6), PackedSequences.from_lists([[]] * 6), np.array([3, 0, 1, 2, 0, 1]))
    groups = [(group.label, group.rows.tolist()) for group in popularity_groups(rows, counts)]
    assert groups == [("5 events", [2, 5]), ("50 events", [3]), ("500 events", [0])]
    assert [group.rows.tolist() for group in seen_and_cold(rows, counts)] == [[0, 2, 3, 5], [1, 4]]


def test_a_group_has_the_metric_of_its_rows() -> None:
    metrics = RankingMetrics.from_ranks(torch.tensor([1, 30, 1, 2]))
    both = [Group("a", np.array([0, 2])), Group("b", np.array([1])), Group("c", np.zeros(0, dtype=np.int64))]
    assert group_metric(metrics, both[0]).mean == 1.0
    assert group_metric(metrics, both[1], "HR@10").mean == 0.0
    assert np.isnan(group_metric(metrics, both[2]).mean)


def test_cold_targets_are_reported_apart() -> None:
    rows = EvaluationRows(
        np.arange(5), PackedSequences.from_lists([[0], [0, 1], [], [2], [1]]), np.array([3, 0, 3, 1, 2])
    )
    metrics = RankingMetrics.from_ranks(torch.tensor([1, 2, 30, 1, 40]))
    counts = np.array([4, 2, 9, 0])
    figures = group_figures(metrics, rows, counts)
    seen, cold = figures["seen in training"]
    assert (seen["group"], seen["rows"], cold["group"], cold["rows"]) == ("seen", 3, "never", 2)
    assert cold["metrics"]["HR@10"]["mean"] == 0.5 and seen["metrics"]["HR@10"]["mean"] == pytest.approx(2 / 3)
    assert sum(group["rows"] for group in figures["popularity"]) == 3
    assert sum(group["rows"] for group in figures["history length"]) == 5
    assert cold_line(metrics, rows, counts, "HR@10").startswith("targets never seen in training: HR@10 0.5000 +- ")
    assert cold_line(metrics, rows, counts, "HR@10").endswith("on 3")
    assert cold_line(metrics, rows, counts + 1) == "every target was seen in training"
    with pytest.raises(ValueError, match=r"group_figures: metrics must be of 5 rows, got \(3,\) ranks"):
        group_figures(RankingMetrics.from_ranks(torch.tensor([1, 2, 3])), rows, counts)
