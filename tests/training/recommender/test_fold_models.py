"""Fitting folds: nothing of a fold's users enters its model; the gap between seen and unseen rows is measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from laser_fast.cli import main
from laser_fast.config import RecommenderConfig, build_config
from laser_fast.data import EvaluationRows, PackedSequences, Split
from laser_fast.evaluation import evaluate
from laser_fast.evaluation.state_gap import measure_state_gap
from laser_fast.recommenders.packed_recommender import CrossFitted, PackedRecommender
from laser_fast.recommenders.recommender_files import load_recommender
from laser_fast.training.recommender.fit import Windows, build_recommender
from laser_fast.training.recommender.train_recommender import _rotation, train_folds, train_recommender

_NUM_ITEMS = 12
_CONFIG = RecommenderConfig(
    width=8, num_layers=1, max_length=5, batch_size=8, learning_rate=0.01, epochs=2, folds=3, dropout=0.2
)


def _split(users: int = 24) -> Split:
    """24 walks along the catalogue; each user has two of the training sequences."""
    generator = np.random.default_rng(0)
    walks = [[int(start + step) % _NUM_ITEMS for step in range(7)] for start in generator.integers(0, 12, users)]

    def rows(back: int) -> EvaluationRows:
        histories = PackedSequences.from_lists([walk[:-back] for walk in walks])
        return EvaluationRows(np.arange(users), histories, np.array([walk[-back] for walk in walks], dtype=np.int64))

    train = PackedSequences.from_lists([walk[:-2] for walk in walks])
    return Split(train, np.arange(users) // 2, rows(2), rows(1), "leave-one-out", "a hash")


@pytest.fixture(scope="module")
def trained() -> PackedRecommender:
    return train_recommender(_split(), _NUM_ITEMS, _CONFIG, seed=3, progress=False)


def _folds(model: PackedRecommender, split: Split, *, seed: int = 3, epochs: int = 2) -> CrossFitted:
    return train_folds(model, split, _CONFIG, epochs=epochs, seed=seed, progress=False)


def _equal(first: PackedRecommender, second: PackedRecommender) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_folds_weights_do_not_depend_on_its_users(trained: PackedRecommender) -> None:
    split = _split()
    folds = _folds(trained, split)
    sequences = split.train.to_lists()
    inside = folds.user_folds[split.train_users] == 1
    changed = [[7, 2, 2, 9] if inside[row] else sequence for row, sequence in enumerate(sequences)]
    assert 0 < inside.sum() < 24
    valid = replace(split.valid, targets=np.where(folds.user_folds == 1, 5, split.valid.targets))
    other = _folds(trained, replace(split, train=PackedSequences.from_lists(changed), valid=valid))
    assert (other.user_folds == folds.user_folds).all()
    assert _equal(folds.models[1], other.models[1])
    assert not _equal(folds.models[0], other.models[0]) and not _equal(folds.models[2], other.models[2])


def test_folds_learn_items_of_their_own(trained: PackedRecommender) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    models = _folds(trained, _split()).models
    weights = [model.item_embedding.weight for model in models]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], trained.item_embedding.weight)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert not any(model.training for model in models)


def test_one_seed_one_result(trained: PackedRecommender) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = _folds(trained, _split())
    assert torch.equal(torch.get_rng_state(), before)
    assert trained.cross_fitted is not None and len(again) == 3
    assert all(map(_equal, trained.cross_fitted.models, again.models))
    assert again.bases is not None and torch.equal(again.bases, trained.cross_fitted.bases)
    assert not _equal(_folds(trained, _split(), seed=4).models[0], again.models[0])


def test_aligned_folds_begin_where_the_full_model_began(trained: PackedRecommender) -> None:
    torch.manual_seed(3)
    start = build_recommender(_NUM_ITEMS, _CONFIG)
    assert all(_equal(model, start) for model in _folds(trained, _split(), epochs=0).models)


def test_states_are_rotated_onto_those_of_the_full_model(trained: PackedRecommender) -> None:
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]

    class Turned:
        def states(self, items: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
            return 0.5 * trained.states(items, cu_seqlens) @ turn

    windows = Windows.cut(_split().train, 5)
    basis = _rotation(trained, cast(PackedRecommender, Turned()), windows, 7)
    torch.testing.assert_close(basis, 2 * turn.T, rtol=1e-4, atol=1e-4)
    for model, found in zip(*_parts_of(_folds(trained, _split())), strict=True):
        one, other = (states.norm(dim=1).mean() for states in _both(trained, model, found))
        assert float(other / one) == pytest.approx(1.0, abs=0.1)  # scaled on the other folds' sequences
        torch.testing.assert_close(found @ found.T, found.square().sum() / 8 * torch.eye(8), rtol=1e-3, atol=1e-3)


def _parts_of(folds: CrossFitted) -> tuple[list[PackedRecommender], torch.Tensor]:
    assert folds.bases is not None
    return folds.models, folds.bases


def _both(full: PackedRecommender, model: PackedRecommender, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.from_numpy(_split().train.items), torch.from_numpy(_split().train.cu_seqlens)
    return full.states(*packed), model.states(*packed) @ basis


def test_folds_change_nothing_of_the_full_model(trained: PackedRecommender) -> None:
    config = _CONFIG.model_copy(update={"folds": 0})
    alone = train_recommender(_split(), _NUM_ITEMS, config, seed=3, progress=False)
    assert alone.cross_fitted is None and _equal(alone, trained)


def test_folds_that_cannot_be_fitted_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    train = PackedSequences.from_lists([[1, 2]] + [[1]] * 23)
    with pytest.raises(ValueError, match=r"train_folds: .* got fold \d of 3 that leaves none; set fewer folds, or"):
        train_recommender(
            replace(_split(), train=train), _NUM_ITEMS, _CONFIG, seed=3, run_dir=tmp_path / "run", progress=False
        )
    assert not list(tmp_path.iterdir())


def test_one_fold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"folds: must be 0 or at least 2 \(one fold leaves no user .*\), got 1"):
        build_config(RecommenderConfig, {"folds": 1})


def test_the_gap_is_that_of_ranking_by_hand(trained: PackedRecommender) -> None:
    split, gap, folds = _split(), trained.gap, trained.cross_fitted
    assert gap is not None and folds is not None and gap.rows == 24 * 4
    assert gap.valid == evaluate(trained, split.valid)["NDCG@10"].mean
    assert gap.in_sample is not None and gap.held_out is not None and gap.held_out_valid is not None
    sequences = split.train.to_lists()
    users = np.repeat(split.train_users, 4)
    histories = [sequence[:length] for sequence in sequences for length in range(1, 5)]
    targets = np.array([sequence[length] for sequence in sequences for length in range(1, 5)])
    rows = EvaluationRows(users, PackedSequences.from_lists(histories), targets)
    assert gap.in_sample == pytest.approx(evaluate(trained, rows)["NDCG@10"].mean)
    by_fold = [evaluate(model, rows.select(folds.user_folds[users] == k)) for k, model in enumerate(folds.models)]
    total = sum(float(metrics["NDCG@10"].mean) * len(metrics) for metrics in by_fold)
    assert gap.held_out == pytest.approx(total / len(rows))
    assert gap.states.keys() == {"in_sample", "held_out", "valid", "held_out_valid"}
    assert gap.states["in_sample"].to_full == pytest.approx(1.0)
    assert 0.9 < gap.states["held_out"].to_full < 0.9999
    turned = [_last(trained, row, fold) for row, fold in zip(histories, folds.user_folds[users], strict=True)]
    assert gap.states["held_out"].norm == pytest.approx(float(torch.stack(turned).norm(dim=1).mean()), rel=1e-5)
    assert gap.states["valid"].norm == pytest.approx(
        float(torch.stack([_last(trained, row) for row in split.valid.histories.to_lists()]).norm(dim=1).mean()),
        rel=1e-5,
    )


def _last(model: PackedRecommender, history: list[int], fold: int | None = None) -> torch.Tensor:
    items = torch.tensor(history[-5:])
    packed = items, torch.tensor([0, len(items)], dtype=torch.int32)
    return (model.states(*packed) if fold is None else model.fold_states(*packed, int(fold)))[-1]


def test_the_gap_of_a_sample_without_folds_and_without_validation(trained: PackedRecommender) -> None:
    split, folds = _split(), trained.cross_fitted
    trained.cross_fitted = None
    try:
        gap = measure_state_gap(trained, replace(split, valid=split.valid.select([])), max_rows=10)
    finally:
        trained.cross_fitted = folds
    assert gap.rows == 10 and gap.in_sample is not None
    assert (gap.held_out, gap.valid, gap.held_out_valid) == (None, None, None)
    assert gap.states.keys() == {"in_sample"}


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec"])
def test_the_command_prints_and_stores_the_gap(
    kind: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--kind", kind, "--set", "width=4", "--set", "epochs=1", "--folds", "2"]
    assert main(["recommender", "train", str(tiny_data), str(tmp_path / "out"), *arguments]) == 0
    loaded = load_recommender(tmp_path / "out")
    assert (
        loaded.cross_fitted is not None and len(loaded.cross_fitted) == 2 and len(loaded.cross_fitted.user_folds) == 30
    )
    assert f"its states: {loaded.gap}" in capsys.readouterr().out and "of the folds that have not seen" in str(
        loaded.gap
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("fold") for line in lines] == [None, 0, 1]
