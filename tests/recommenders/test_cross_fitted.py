"""Folds beside a recommender: whose states a history gets, what is kept in files, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from laser_fast.data import PackedSequences
from laser_fast.files.sealed import seal
from laser_fast.recommenders import SASRec
from laser_fast.recommenders.cross_fitted import CrossFitted, FoldItems, StateGap, StateSpread, assign_folds, fold_model
from laser_fast.recommenders.protocol import FrozenRecommender
from laser_fast.recommenders.recommender_files import load_recommender, save_recommender

_HISTORIES = PackedSequences.from_lists([[3, 1], [], [4, 1, 5], [9], [2, 6, 5, 3], [8]])
_ITEMS = torch.from_numpy(_HISTORIES.items)
_BOUNDS = torch.from_numpy(_HISTORIES.cu_seqlens)
_GAP = StateGap(7, 0.6, 0.12, 0.11, None, {"valid": StateSpread(2.0, 0.5, 0.1, 1.0)})


def made(items: FoldItems = "shared", folds: int = 3) -> SASRec:
    """A SASRec with folds, all of random weights."""
    torch.manual_seed(0)
    model = SASRec(10, width=8, num_layers=1, max_length=6).eval()
    model.split_hash = "a hash"
    models = [fold_model(model, items).eval() for _ in range(folds)]
    bases = torch.randn(folds, 8, 8) if items == "aligned" else None
    model.cross_fitted = CrossFitted(models, assign_folds(20, folds, 0), items, "a hash", bases)
    return model


def test_every_user_is_in_one_fold_by_the_seed() -> None:
    folds = assign_folds(20, 3, 0)
    assert folds.dtype == np.int8 and sorted(np.bincount(folds).tolist()) == [6, 7, 7]
    assert (folds == assign_folds(20, 3, 0)).all() and (folds != assign_folds(20, 3, 1)).any()
    crossed = CrossFitted([], folds, "shared", None)
    assert crossed.of_users(np.array([4, 4, 19])).tolist() == [folds[4], folds[4], folds[19]]
    with pytest.raises(ValueError, match=r"CrossFitted: users must be in 0\.\.19, got 20"):
        crossed.of_users(np.array([3, 20]))


@pytest.mark.parametrize("folds", [[0, 2, -1, 1, 0, -1], [-1, 1, 1, 1, 1, 1], [2, 2, 0, 0, 1, 1]])
def test_each_history_gets_the_states_of_its_fold(folds: list[int]) -> None:
    model = made()
    states = FrozenRecommender(model).states(_ITEMS, _BOUNDS, torch.tensor(folds))
    for row, fold in enumerate(folds):
        alone = torch.from_numpy(_HISTORIES[row]), torch.tensor([0, len(_HISTORIES[row])], dtype=torch.int32)
        expected = model.states(*alone) if fold < 0 else model.fold_states(*alone, fold)
        torch.testing.assert_close(states[_BOUNDS[row] : _BOUNDS[row + 1]], expected)
    assert not torch.allclose(model.fold_states(_ITEMS, _BOUNDS, 0), model.fold_states(_ITEMS, _BOUNDS, 1), atol=0.1)


def test_without_folds_all_states_are_those_of_the_full_model() -> None:
    model = made()
    expected = model.states(_ITEMS, _BOUNDS)
    assert torch.equal(FrozenRecommender(model).states(_ITEMS, _BOUNDS), expected)
    assert torch.equal(FrozenRecommender(model).states(_ITEMS, _BOUNDS, torch.full((6,), -1)), expected)


def test_a_fold_that_does_not_exist_is_refused() -> None:
    class Other:
        num_items, state_size, split_hash = 10, 8, None
        states = score = lambda self, items, cu_seqlens: torch.zeros(len(items), 8)

    with pytest.raises(ValueError, match=r"SASRec\.fold_states: fold must be one of 3, got 3"):
        made().fold_states(_ITEMS, _BOUNDS, 3)
    with pytest.raises(ValueError, match=r"SASRec\.fold_states: fold must be one of 0, got 0"):
        SASRec(10, width=8).fold_states(_ITEMS, _BOUNDS, 0)
    with pytest.raises(ValueError, match="recommender must have fold_states for rows with a fold, got a Other without"):
        FrozenRecommender(Other()).states(_ITEMS, _BOUNDS, torch.zeros(6, dtype=torch.int64))


def test_states_of_a_fold_are_brought_into_the_full_models_basis() -> None:
    model = made("aligned")
    folds = model.cross_fitted
    assert folds is not None and folds.bases is not None
    expected = folds.models[2].states(_ITEMS, _BOUNDS) @ folds.bases[2]
    assert torch.equal(model.fold_states(_ITEMS, _BOUNDS, 2), expected)
    model.double()
    assert model.fold_states(_ITEMS, _BOUNDS, 2).dtype == torch.float64


def test_folds_follow_the_model_and_are_no_part_of_its_state() -> None:
    model = made().double()
    assert model.cross_fitted is not None
    assert all(value.dtype == torch.float64 for fold in model.cross_fitted.models for value in fold.parameters())
    assert model.cross_fitted.models[1].item_embedding.weight is model.item_embedding.weight
    assert model.state_dict().keys() == SASRec(10, width=8, num_layers=1).state_dict().keys()


@pytest.mark.parametrize("items", ["aligned", "own", "shared"])
def test_folds_are_saved_and_loaded(items: FoldItems, tmp_path: Path) -> None:
    model = made(items)
    model.gap = _GAP
    save_recommender(model, tmp_path / "model")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = load_recommender(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.cross_fitted is not None and model.cross_fitted is not None and loaded.gap == _GAP
    for fold in range(3):
        states = loaded.fold_states(_ITEMS, _BOUNDS, fold)
        assert torch.equal(states, model.fold_states(_ITEMS, _BOUNDS, fold))
        assert not loaded.cross_fitted.models[fold].training
    assert (loaded.cross_fitted.user_folds == model.cross_fitted.user_folds).all()
    assert loaded.cross_fitted.user_folds.dtype == np.int8
    assert (loaded.cross_fitted.items, loaded.cross_fitted.split_hash) == (items, "a hash")
    names = load_file(tmp_path / "model" / "recommender_folds.safetensors").keys()
    assert ("0.item_embedding.weight" in names) is (items != "shared") and ("bases" in names) is (items == "aligned")
    recorded = json.loads((tmp_path / "model" / "recommender.json").read_text())
    assert recorded["folds"] == {"number": 3, "items": items, "split_hash": "a hash"}


def test_a_folder_without_folds_is_read_as_before(tmp_path: Path) -> None:
    model = made()
    model.cross_fitted = None
    save_recommender(model, tmp_path / "model")
    recorded = json.loads((tmp_path / "model" / "recommender.json").read_text())
    assert recorded["folds"] is None and recorded["gap"] is None
    loaded = load_recommender(tmp_path / "model")
    assert loaded.cross_fitted is None and loaded.gap is None


def test_damaged_folds_are_refused(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        seal(tmp_path / "model")
        with pytest.raises(ValueError, match="load_recommender: " + message):
            load_recommender(tmp_path / "model")

    save_recommender(made(), tmp_path / "model")
    path, record = tmp_path / "model" / "recommender_folds.safetensors", tmp_path / "model" / "recommender.json"
    whole, text = load_file(path), record.read_text()

    def changed(name: str, value: Tensor) -> None:
        save_file({**whole, name: value}, path)

    changed("1.norm.bias", torch.zeros(3))
    refused(r"recommender_folds.safetensors must hold the weights of 3 folds of this sasrec, got '1\.norm\.bias'")
    changed("3.norm.bias", torch.zeros(8))
    refused(r".* got '3\.norm\.bias' that is missing, unknown or of another shape")
    changed("bases", torch.zeros(3, 8, 7))
    refused(r"bases of recommender_folds.safetensors must have shape None, got \(3, 8, 7\)")
    changed("user_folds", torch.full((20,), 3, dtype=torch.int8))
    refused(r"user_folds of recommender_folds.safetensors must be int8 in 0\.\.2, got torch.int8 \[3\]")
    record.write_text(text.replace('"split_hash": "a hash"', '"split_hash": "another"', 1))
    refused("the folds must be of the recommender's split, another, got a hash")
    record.write_text(text)
    seal(tmp_path / "model")
    path.write_bytes(b"\x80\x04not safetensors")
    with pytest.raises(ValueError, match=r"recommender_folds\.safetensors of .*model must be the file that was"):
        load_recommender(tmp_path / "model")
    path.unlink()
    with pytest.raises(ValueError, match=r"model must be whole, got no recommender_folds\.safetensors"):
        load_recommender(tmp_path / "model")
    seal(tmp_path / "model")
    with pytest.raises(ValueError, match=r"recommender_folds\.safetensors must be among the files of seal\.json"):
        load_recommender(tmp_path / "model")


def test_the_spread_of_states() -> None:
    states = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    spread = StateSpread.of(states, torch.tensor([[1.0, 0.0], [1.0, 0.0], [-5.0, 0.0]]))
    assert spread.norm == pytest.approx(2.0) and spread.norm_deviation == pytest.approx(1.0)
    assert spread.alike == pytest.approx(1 / 3) and spread.to_full == pytest.approx(0.0)


def test_the_gap_in_words() -> None:
    assert str(_GAP) == (
        "NDCG@10 0.6000 on 7 training rows, whose targets it has seen, 0.1200 of the folds that have not seen these "
        "users, 0.1100 on the validation rows"
    )
    assert "unknown on the validation rows" in str(StateGap(0, None, None, None, None, {}))
