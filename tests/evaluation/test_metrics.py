"""Ranks, metric values and their errors against tables worked out by hand."""

import math

import pytest
import torch

from laser_fast.evaluation import MetricValue, RankingMetrics, paired_difference, rank_values, table, target_ranks


def test_ranks_of_a_hand_made_table() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [2.0, 2.0, 1.0], [2.0, 2.0, 1.0]])
    targets = torch.tensor([0, 1, 2, 0, 2])
    assert target_ranks(scores, targets).tolist() == [3, 1, 2, 2, 3]


def test_ties_count_against_the_target() -> None:
    assert target_ranks(torch.zeros(2, 7), torch.tensor([0, 6])).tolist() == [7, 7]


def test_constant_scorer_gets_no_credit() -> None:
    metrics = RankingMetrics.from_ranks(target_ranks(torch.ones(4, 11), torch.tensor([0, 3, 5, 10])))
    assert metrics["HR@10"].mean == 0.0
    assert metrics["NDCG@10"].mean == 0.0


def test_minus_infinity_is_an_excluded_item() -> None:
    scores = torch.tensor([[-math.inf, 0.0, 1.0]])
    assert target_ranks(scores, torch.tensor([1])).tolist() == [2]
    assert target_ranks(scores, torch.tensor([0])).tolist() == [3]


def test_ranks_of_no_rows() -> None:
    ranks = target_ranks(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert ranks.shape == (0,)
    assert ranks.dtype == torch.int64


def test_rank_errors_name_the_value() -> None:
    scores = torch.zeros(2, 3)
    scores[1, 2] = math.nan
    with pytest.raises(ValueError, match="scores must not be NaN, got NaN in row 1 for item 2"):
        target_ranks(scores, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"targets must be in 0\.\.2, got 3"):
        target_ranks(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"targets must be in 0\.\.2, got -1"):
        target_ranks(torch.zeros(2, 3), torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match=r"shapes \[B, I\] and \[B\], got \(2, 3\) and \(1,\)"):
        target_ranks(torch.zeros(2, 3), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"targets must be int64, got torch\.int32"):
        target_ranks(torch.zeros(2, 3), torch.tensor([0, 1], dtype=torch.int32))


def test_values_of_a_hand_made_table() -> None:
    ranks = torch.tensor([1, 2, 3, 11])
    assert rank_values(ranks, "HR@2").tolist() == [1, 1, 0, 0]
    assert rank_values(ranks, "NDCG@10").tolist() == pytest.approx([1.0, 1 / math.log2(3), 0.5, 0.0])
    assert rank_values(ranks, "MRR").tolist() == pytest.approx([1.0, 1 / 2, 1 / 3, 1 / 11])
    metrics = RankingMetrics.from_ranks(ranks)
    assert metrics["HR@1"].mean == 0.25
    assert metrics["HR@5"].mean == 0.75
    assert metrics["HR@10"].mean == 0.75
    assert metrics["HR@20"].mean == 1.0
    assert metrics["NDCG@10"].mean == pytest.approx((1 + 1 / math.log2(3) + 0.5) / 4)
    assert metrics["NDCG@20"].mean == pytest.approx((1 + 1 / math.log2(3) + 0.5 + 1 / math.log2(12)) / 4)
    assert metrics["MRR"].mean == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 11) / 4)


def test_a_hit_at_exactly_k_counts_and_one_past_does_not() -> None:
    assert rank_values(torch.tensor([10, 11]), "HR@10").tolist() == [1, 0]
    assert rank_values(torch.tensor([10, 11]), "NDCG@10").tolist() == pytest.approx([1 / math.log2(11), 0])


def test_standard_error_and_interval_by_hand() -> None:
    # values 1, 0, 0, 1: mean 1/2, sample variance 1/3, standard error sqrt(1/3)/2
    value = RankingMetrics.from_ranks(torch.tensor([1, 9, 9, 1]))["HR@1"]
    assert value.standard_error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert value.ci95 == pytest.approx(1.96 * math.sqrt(1 / 3) / 2, rel=1e-4)


def test_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        values = (torch.rand(500, generator=generator) < 0.3).double()
        value = MetricValue.from_values(values)
        covered += abs(value.mean - 0.3) <= value.ci95
    assert 0.92 * 400 <= covered <= 0.98 * 400


@pytest.mark.parametrize("count", [0, 1])
def test_what_is_undefined_is_none(count: int) -> None:
    numbers = RankingMetrics.from_ranks(torch.ones(count, dtype=torch.int64), ks=(3,)).to_dict()
    assert numbers["rows"] == count and set(numbers["metrics"]) == {"HR@3", "NDCG@3", "MRR"}
    mean = 1.0 if count else None
    assert numbers["metrics"]["HR@3"] == {"mean": mean, "standard_error": None, "ci95": None}


def test_a_metric_that_is_not_there() -> None:
    with pytest.raises(KeyError, match=r"no metric 'HR@2', got HR@1, NDCG@1, MRR"):
        RankingMetrics.from_ranks(torch.tensor([1]), ks=(1,))["HR@2"]


def test_ranks_are_kept() -> None:
    assert RankingMetrics.from_ranks(torch.tensor([4, 2])).ranks.tolist() == [4, 2]


@pytest.mark.parametrize("name", ["hr@10", "HR@0", "NDCG", "MRR@10", "HR@1.5"])
def test_unknown_metrics_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"metric must be .*, got {name!r}"):
        rank_values(torch.tensor([1]), name)


def test_ranks_and_cutoffs_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        RankingMetrics.from_ranks(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"ks must be at least 1, got \(0,\)"):
        RankingMetrics.from_ranks(torch.tensor([1]), ks=(0,))


def test_paired_difference_uses_the_pairing() -> None:
    ranks_a, ranks_b = torch.tensor([1, 1, 20, 20]), torch.tensor([1, 20, 20, 20])
    difference = paired_difference(ranks_a, ranks_b, "HR@10")
    assert difference.mean == 0.25
    assert difference.standard_error == pytest.approx(0.5 / 2)  # values 0, 1, 0, 0: sample deviation 1/2
    assert paired_difference(ranks_b, ranks_a, "HR@10").mean == -0.25
    assert paired_difference(ranks_a, ranks_a).standard_error == 0.0


def test_paired_difference_refuses_other_rows() -> None:
    with pytest.raises(ValueError, match=r"same rows, got \(2,\) and \(3,\) ranks"):
        paired_difference(torch.tensor([1, 2]), torch.tensor([1, 2, 3]))


def test_table_is_aligned() -> None:
    rows = {
        "short": RankingMetrics.from_ranks(torch.tensor([1, 2])),
        "a longer name": RankingMetrics.from_ranks(torch.tensor([3, 30])),
    }
    lines = table(rows, ["HR@1", "NDCG@10"]).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["HR@1", "NDCG@10"]
    assert lines[1].startswith("short          0.5000 +- 0.98")
    assert lines[2].startswith("a longer name  0.0000 +- 0.0000")
    assert table({}) == ""


def test_table_shows_all_metrics_by_default_and_a_dash_for_no_rows() -> None:
    lines = table({"nobody": RankingMetrics.from_ranks(torch.empty(0, dtype=torch.int64), ks=(1,))}).splitlines()
    assert lines[0].split() == ["HR@1", "NDCG@1", "MRR"]
    assert lines[1].split() == ["nobody", "-", "-", "-"]
