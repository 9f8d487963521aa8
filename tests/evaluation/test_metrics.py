"""Ranks, metric values and their errors against tables worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from laser_fast.evaluation.metrics import (
    MetricValue,
    RankingMetrics,
    paired_difference,
    rank_values,
    table,
    target_ranks,
)


@pytest.mark.parametrize(
    ("scores", "targets", "expected"),
    [
        ([[0.1, 0.9, 0.5]] * 3, [0, 1, 2], [3, 1, 2]),
        ([[2.0, 2.0, 1.0]] * 2, [0, 2], [2, 3]),  # ties count against the target
        ([[0.0] * 7] * 2, [0, 6], [7, 7]),
        ([[-math.inf, 0.0, 1.0]] * 2, [1, 0], [2, 3]),  # an excluded item
    ],
    ids=["distinct", "tied", "constant", "excluded"],
)
def test_ranks_of_a_hand_made_table(scores: list[list[float]], targets: list[int], expected: list[int]) -> None:
    assert target_ranks(torch.tensor(scores), torch.tensor(targets)).tolist() == expected


def test_ranks_of_no_rows() -> None:
    ranks = target_ranks(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert ranks.shape == (0,) and ranks.dtype == torch.int64


@pytest.mark.parametrize(
    ("scores", "targets", "error", "message"),
    [
        ([[0, 0, 0], [0, 0, math.nan]], torch.tensor([0, 0]), ValueError, "NaN, got NaN in row 1 for item 2"),
        ([[0, 0, 0]] * 2, torch.tensor([0, 3]), ValueError, r"targets must be in 0\.\.2, got 3"),
        ([[0, 0, 0]] * 2, torch.tensor([-1, 0]), ValueError, r"targets must be in 0\.\.2, got -1"),
        ([[0, 0, 0]] * 2, torch.tensor([0]), ValueError, r"shapes \[B, I\] and \[B\], got \(2, 3\) and \(1,\)"),
        ([[0, 0, 0]], torch.tensor([0]).int(), TypeError, r"targets must be int64, got torch\.int32"),
    ],
    ids=["nan", "large", "negative", "shape", "dtype"],
)
def test_rank_errors_name_the_value(
    scores: list[list[float]], targets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"target_ranks: .*{message}"):
        target_ranks(torch.tensor(scores, dtype=torch.float32), targets)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("HR@2", [1, 1, 0, 0]),
        ("HR@11", [1, 1, 1, 1]),
        ("NDCG@10", [1.0, 1 / math.log2(3), 0.5, 0.0]),
        ("NDCG@20", [1.0, 1 / math.log2(3), 0.5, 1 / math.log2(12)]),
        ("MRR", [1.0, 1 / 2, 1 / 3, 1 / 11]),
    ],
)
def test_values_of_a_hand_made_table(metric: str, expected: list[float]) -> None:
    ranks = torch.tensor([1, 2, 3, 11])
    assert rank_values(ranks, metric).tolist() == pytest.approx(expected)
    found = RankingMetrics.from_ranks(ranks, ks=(2, 10, 11, 20))
    assert found[metric].mean == pytest.approx(sum(expected) / 4) and len(found) == 4
    assert found.ranks.tolist() == ranks.tolist()


def test_standard_error_and_interval_by_hand() -> None:
    # values 1, 0, 0, 1: mean 1/2, sample variance 1/3, standard error sqrt(1/3)/2
    value = RankingMetrics.from_ranks(torch.tensor([1, 9, 9, 1]))["HR@1"]
    assert value == MetricValue(0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert value.ci95 == pytest.approx(1.96 * math.sqrt(1 / 3) / 2, rel=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_what_is_undefined_is_none(count: int) -> None:
    numbers = RankingMetrics.from_ranks(torch.ones(count, dtype=torch.int64), ks=(3,)).to_dict()
    assert numbers["rows"] == count and set(numbers["metrics"]) == {"HR@3", "NDCG@3", "MRR"}
    mean = 1.0 if count else None
    assert numbers["metrics"]["HR@3"] == {"mean": mean, "standard_error": None, "ci95": None}


@pytest.mark.parametrize("name", ["hr@10", "HR@0", "NDCG", "MRR@10", "HR@1.5"])
def test_unknown_metrics_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"metric must be .*, got {name!r}"):
        rank_values(torch.tensor([1]), name)


def test_ranks_and_cutoffs_below_one_and_other_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        RankingMetrics.from_ranks(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"ks must be at least 1, got \(0,\)"):
        RankingMetrics.from_ranks(torch.tensor([1]), ks=(0,))
    with pytest.raises(KeyError, match=r"no metric 'HR@2', got HR@1, NDCG@1, MRR"):
        RankingMetrics.from_ranks(torch.tensor([1]), ks=(1,))["HR@2"]


def test_paired_difference_uses_the_pairing() -> None:
    ranks_a, ranks_b = torch.tensor([1, 1, 20, 20]), torch.tensor([1, 20, 20, 20])
    # values 0, 1, 0, 0: sample deviation 1/2
    assert paired_difference(ranks_a, ranks_b, "HR@10") == MetricValue(0.25, pytest.approx(0.5 / 2))
    assert paired_difference(ranks_b, ranks_a, "HR@10").mean == -0.25
    assert paired_difference(ranks_a, ranks_a).standard_error == 0.0
    with pytest.raises(ValueError, match=r"same rows, got \(2,\) and \(3,\) ranks"):
        paired_difference(torch.tensor([1, 2]), torch.tensor([1, 2, 3]))


def test_table_is_aligned() -> None:
    systems = {
        "short": RankingMetrics.from_ranks(torch.tensor([1, 2])),
        "a longer name": RankingMetrics.from_ranks(torch.tensor([3, 30])),
    }
    lines = table(systems, ["HR@1", "NDCG@10"]).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["HR@1", "NDCG@10"]
    assert lines[1].startswith("short          0.5000 +- 0.98")
    assert lines[2].startswith("a longer name  0.0000 +- 0.0000")
    assert table({}) == ""


def test_table_shows_all_metrics_by_default_and_a_dash_for_no_rows() -> None:
    lines = table({"nobody": RankingMetrics.from_ranks(torch.empty(0, dtype=torch.int64), ks=(1,))}).splitlines()
    assert lines[0].split() == ["HR@1", "NDCG@1", "MRR"]
    assert lines[1].split() == ["nobody", "-", "-", "-"]
