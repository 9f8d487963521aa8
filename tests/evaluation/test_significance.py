"""Bootstrap intervals, the permutation test, and figures of several seeds."""

import itertools

import numpy as np
import pytest
import torch

from laser_fast.evaluation import (
    RankingMetrics,
    across_seeds,
    bootstrap_interval,
    paired_significance,
    rank_values,
    table,
)


def ranks(count: int, seed: int, highest: int = 20) -> torch.Tensor:
    return torch.randint(1, highest + 1, (count,), generator=torch.Generator().manual_seed(seed))


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_rows() -> None:
    values = rank_values(ranks(4000, 0), "NDCG@10")
    low, high = bootstrap_interval(values, resamples=3000)
    mean, half = values.mean().item(), 1.959964 * values.std().item() / 4000**0.5
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_results_follow_the_seed_and_not_the_size_of_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values, pair = rank_values(ranks(50, 0), "HR@10"), (ranks(40, 0), ranks(40, 1))
    once, whole = bootstrap_interval(values, seed=4), paired_significance(*pair)
    assert once == bootstrap_interval(values, seed=4)
    assert 0 <= once[0] < values.mean() < once[1] <= 1
    assert bootstrap_interval(torch.ones(1)) == (1.0, 1.0)
    assert all(end != end for end in bootstrap_interval(torch.ones(0)))
    monkeypatch.setattr("laser_fast.evaluation.significance._MAX_DRAWS", 4000)
    assert bootstrap_interval(values, seed=4) == pytest.approx(once, abs=0.05)
    assert paired_significance(*pair).p_value == pytest.approx(whole.p_value, abs=0.02)


def test_p_is_the_share_of_signs_that_reach_as_far() -> None:
    a, b = torch.tensor([1, 2, 1, 4, 1, 3, 9, 2]), torch.tensor([2, 2, 3, 1, 5, 9, 20, 2])
    differences = (rank_values(a, "MRR") - rank_values(b, "MRR")).tolist()
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((-1, 1), repeat=8)
    ]
    exact = sum(abs(value) >= abs(sum(differences)) - 1e-12 for value in sums) / len(sums)
    result = paired_significance(a, b, "MRR", resamples=20_000)
    assert 0.05 < exact < 0.95
    assert result.p_value == pytest.approx(exact, abs=0.015)
    assert result.difference == pytest.approx(sum(differences) / 8, abs=1e-12)
    assert result.low < result.difference < result.high
    assert result.to_dict()["rows"] == 8
    assert str(result).startswith(f"MRR {result.difference:+.4f} [")


def test_a_system_does_not_differ_from_itself_and_does_from_a_better_one() -> None:
    a = ranks(300, 1)
    same = paired_significance(a, a.clone())
    assert (same.p_value, same.difference, same.low, same.high) == (1.0, 0.0, 0.0, 0.0)
    better = paired_significance(torch.clamp(a - 5, min=1), a, resamples=999)
    assert better.p_value == pytest.approx(1 / 1000) and better.low > 0
    worse = paired_significance(a, torch.clamp(a - 5, min=1), resamples=999)
    assert worse.difference == -better.difference and worse.p_value == better.p_value


def test_p_is_even_where_nothing_differs() -> None:
    found = [
        paired_significance(ranks(60, seed), ranks(60, seed + 1000), "MRR", resamples=200).p_value
        for seed in range(200)
    ]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.10  # 0.05 expected, deviation 0.015
    assert np.mean(found) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("a", "b", "settings", "message"),
    [
        ([1, 2], [1], {}, r"same rows, at least one, got \(2,\) and \(1,\) ranks"),
        ([], [], {}, r"same rows, at least one, got \(0,\) and \(0,\) ranks"),
        ([1], [1], {"metric": "AUC"}, "rank_values: metric must be .*, got 'AUC'"),
        ([1], [1], {"resamples": 0}, "bootstrap_interval: resamples must be from 1 to 10,000,000, got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    a: list[int], b: list[int], settings: dict[str, object], message: str
) -> None:
    pair = torch.tensor(a, dtype=torch.int64), torch.tensor(b, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        paired_significance(*pair, **settings)  # type: ignore[arg-type]


def test_figures_of_several_seeds() -> None:
    runs = [RankingMetrics.from_ranks(ranks(30, seed), ks=(1, 10)) for seed in range(3)]
    spread = across_seeds(runs)
    means = np.array([run["NDCG@10"].mean for run in runs])
    assert spread["NDCG@10"].mean == pytest.approx(means.mean(), abs=1e-12)
    assert spread["NDCG@10"].deviation == pytest.approx(means.std(ddof=1), abs=1e-12)
    assert spread["NDCG@10"].runs == 3
    lines = table({"Laser": spread}, ("NDCG@10", "MRR")).splitlines()
    assert lines[0].split() == ["NDCG@10", "MRR"]
    assert f"{means.mean():.4f} (sd {means.std(ddof=1):.4f})" in lines[1]
    alone = across_seeds(runs[:1])["MRR"]
    assert alone.to_dict()["deviation"] is None and str(alone) == f"{alone.mean:.4f}"


def test_runs_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="across_seeds: at least one run is needed, got none"):
        across_seeds([])
    with pytest.raises(ValueError, match=r"the same rows and metrics, got \[3, 4\] rows"):
        across_seeds([RankingMetrics.from_ranks(ranks(count, 0)) for count in (3, 4)])
