"""Drawn candidates: what may be among them, how often, and that a file gives back the same ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from laser_fast.data import EvaluationRows, PackedSequences
from laser_fast.evaluation import Candidates, draw_candidates, evaluate_candidates, llara_candidates
from laser_fast.recommenders import Popularity

_HISTORIES = [[0, 1, 2], [5], [], [7, 7, 3, 9]]


def rows_of(histories: list[list[int]] = _HISTORIES, targets: tuple[int, ...] = (4, 5, 0, 8)) -> EvaluationRows:
    packed = PackedSequences.from_lists(histories)
    return EvaluationRows(np.arange(len(histories)), packed, np.array(targets, dtype=np.int64))


@pytest.mark.parametrize("popularity", [False, True])
def test_candidates_are_the_target_and_distinct_items_outside_the_history(popularity: bool) -> None:
    counts = np.array([5, 4, 3, 2, 0, 1, 9, 9, 1, 1, 1, 0]) if popularity else None
    drawn = draw_candidates(rows_of(), 12, 6, draws=30, seed=3, counts=counts)
    assert drawn.items.shape == (30, 4, 6)
    for draw in drawn.items.tolist():
        for history, target, items in zip(_HISTORIES, (4, 5, 0, 8), draw, strict=True):
            assert items[0] == target and len(set(items)) == 6
            assert not set(items[1:]) & set(history)
            assert set(items) <= set(range(12))
            assert counts is None or all(counts[item] > 0 for item in items[1:])
    assert len(np.unique(drawn.items[:, 2, 1:])) == (11 if counts is None else 9)  # everything allowed turns up


def test_uniform_draws_are_uniform_and_popular_ones_follow_the_counts() -> None:
    rows = rows_of([[0]], (1,))
    even = draw_candidates(rows, 6, 2, draws=4000).items[:, 0, 1]
    # 4 items with 1/4 each: a deviation of 4000 draws is 27
    assert np.abs(np.bincount(even, minlength=6) - np.array([0, 0, 1000, 1000, 1000, 1000])).max() < 120
    counts = np.array([50, 50, 1, 2, 3, 4])
    weighted = np.bincount(draw_candidates(rows, 6, 2, draws=4000, counts=counts).items[:, 0, 1], minlength=6)
    assert np.abs(weighted - np.array([0, 0, 400, 800, 1200, 1600])).max() < 130


def test_a_row_keeps_its_candidates_whatever_else_is_drawn() -> None:
    few = draw_candidates(rows_of(_HISTORIES[:2], (4, 5)), 12, 6, draws=2, seed=1)
    many = draw_candidates(rows_of(), 12, 6, draws=5, seed=1)
    assert np.array_equal(few.items, many.items[:2, :2])
    assert not np.array_equal(many.items[0], many.items[1])
    assert not np.array_equal(draw_candidates(rows_of(), 12, 6, draws=5, seed=2).items, many.items)


def test_llara_hides_the_shown_history_alone() -> None:
    rows = rows_of([list(range(14))], (14,))  # the newest ten, 4 to 13, are shown
    drawn = llara_candidates(rows, 40, draws=30)
    assert drawn.items.shape == (30, 1, 20) and drawn.suffix == "|sampled20"
    others = set(drawn.items[:, :, 1:].ravel().tolist())
    assert others == set(range(40)) - set(range(4, 14)) - {14}


def test_what_is_no_file_of_candidates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Candidates.load: the path must be a file, got"):
        Candidates.load(tmp_path / "none")
    save_file({"items": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="the description in other must have format 2, got None; draw the candidates"):
        Candidates.load(tmp_path / "other")
    (tmp_path / "text").write_text("nothing of the kind, but long enough")
    with pytest.raises(ValueError, match="Candidates.load: text must be a whole safetensors file, got"):
        Candidates.load(tmp_path / "text")


def test_a_file_gives_back_the_same_candidates_or_is_refused(tmp_path: Path, damage_files: Callable[..., int]) -> None:
    drawn = draw_candidates(rows_of(), 12, 5, draws=3, seed=7, counts=np.ones(12, dtype=np.int64))
    file = tmp_path / "folder" / "candidates"
    file.parent.mkdir()
    drawn.save(file)

    def same(read: Candidates) -> bool:
        facts = (read.sampler, read.seed, read.rows_hash, read.suffix)
        return facts == ("popularity", 7, drawn.rows_hash, "|popularity5") and np.array_equal(read.items, drawn.items)

    assert same(Candidates.load(file))
    assert damage_files(file.parent, lambda: Candidates.load(file), same, 80) > 70


def test_candidates_of_other_rows_or_items_are_refused() -> None:
    drawn = draw_candidates(rows_of(), 12, 5)
    scorer = Popularity(torch.arange(12))
    with pytest.raises(ValueError, match="rows must be those the candidates were drawn for, .*; draw anew"):
        evaluate_candidates(scorer, rows_of(targets=(4, 5, 0, 10)), drawn)
    outside = Candidates(drawn.items + 3, "uniform", 0, drawn.rows_hash)
    with pytest.raises(ValueError, match=r"items must be in 0\.\.11, got 1"):
        evaluate_candidates(scorer, rows_of(), outside)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 1}, "num_candidates must be at least 2, got 1"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shown": -1}, "shown must be at least 0, got -1"),
        ({"num_candidates": 10}, r"must be at most 9 for row 0 .*, got 10"),
        ({"counts": np.ones(3)}, r"counts must be 12 numbers of at least 0, got shape \(3,\)"),
        ({"counts": np.zeros(12)}, "must be at most 1 for row 0 .*, got 5"),
    ],
)
def test_draws_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"draw_candidates: {message}|draw_candidates: num_candidates {message}"):
        draw_candidates(rows_of(), 12, **{"num_candidates": 5, **settings})  # type: ignore[arg-type]


def test_ranks_and_errors_equal_a_count_by_hand(fixed_scores: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (4, 12), generator=generator).float()  # many ties
    rows = rows_of()
    drawn = draw_candidates(rows, 12, 6, draws=7)
    metrics = evaluate_candidates(fixed_scores(scores), rows, drawn, ks=(1, 3, 6, 20), batch_size=3)
    expected = np.empty((7, 4))
    for draw in range(7):
        for row in range(4):
            target, *others = (float(scores[row, item]) for item in drawn.items[draw, row])
            expected[draw, row] = 1 + sum(other >= target for other in others)
    assert np.array_equal(metrics.ranks.numpy(), expected)
    assert list(metrics.values) == [f"{name}|sampled6" for name in ("HR@1", "HR@3", "NDCG@1", "NDCG@3", "MRR")]
    hits = (expected <= 3).astype(float)
    value = metrics["HR@3|sampled6"].to_dict()
    assert value["mean"] == pytest.approx(hits.mean(), abs=1e-12)
    assert value["standard_error"] == pytest.approx(hits.mean(0).std(ddof=1) / 2, abs=1e-12)
    assert value["draw_deviation"] == pytest.approx(hits.mean(1).std(ddof=1), abs=1e-12)
    assert value["draw_error"] == pytest.approx(hits.mean(1).std(ddof=1) / 7**0.5, abs=1e-12)
    assert (len(metrics), metrics.to_dict()["rows"], metrics.to_dict()["draws"]) == (4, 4, 7)


def test_one_draw_has_no_error_over_draws_and_a_constant_no_credit() -> None:
    rows = rows_of()
    metrics = evaluate_candidates(Popularity(torch.zeros(12)), rows, draw_candidates(rows, 12, 6))
    assert metrics.ranks.tolist() == [[6, 6, 6, 6]]
    assert metrics["HR@5|sampled6"].to_dict()["draw_error"] is None
    assert metrics["HR@5|sampled6"].mean == 0.0
    with pytest.raises(KeyError, match="no metric 'HR@5', got"):
        metrics["HR@5"]  # never under the name of a full ranking


def test_broken_scores_and_cut_offs_are_refused(fixed_scores: Any) -> None:
    rows = rows_of()
    drawn = draw_candidates(rows, 12, 2)
    scores = torch.zeros(4, 12)
    with pytest.raises(ValueError, match=r"evaluate_candidates: ks must be at least 1, got \(0,\)"):
        evaluate_candidates(fixed_scores(scores), rows, drawn, ks=(0,))
    narrow = fixed_scores(scores[:, :3])
    narrow.num_items = 12
    with pytest.raises(ValueError, match=r"evaluate_candidates: score must return shape \(4, 12\), got \(4, 3\)"):
        evaluate_candidates(narrow, rows, drawn)
    scores[2, 11] = float("nan")  # also where it is no candidate
    with pytest.raises(ValueError, match="scores must not be NaN, got NaN in rows from 2 on"):
        evaluate_candidates(fixed_scores(scores), rows, drawn, batch_size=1)
