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
from laser_fast.recommenders.packed_recommender import CrossFitted, assign_folds
from laser_fast.recommenders.protocol import FrozenRecommender
from laser_fast.recommenders.recommender_files import load_recommender, save_recommender
from laser_fast.recommenders.state_spread import StateGap, StateSpread

_HISTORIES = PackedSequences.from_lists([[3, 1], [], [4, 1, 5], [9], [2, 6, 5, 3], [8]])
_ITEMS = torch.from_numpy(_HISTORIES.items)
_BOUNDS = torch.from_numpy(_HISTORIES.cu_seqlens)
_GAP = StateGap(7, 0.6, 0.12, 0.11, None, {"valid": StateSpread(2.0, 0.5, 0.1, 1.0)})


@pytest.fixture
def model() -> SASRec:
    """A SASRec with three folds, all of random weights."""
    torch.manual_seed(0)
    model = SASRec(10, width=8, num_layers=1, max_length=6).eval()
    model.split_hash, model.gap = "a hash", _GAP
    models = [model.twin().eval() for _ in range(3)]
    model.cross_fitted = CrossFitted(models, assign_folds(20, 3, 0), "a hash", torch.randn(3, 8, 8))
    return model


def folds_of(model: SASRec) -> CrossFitted:
    assert model.cross_fitted is not None
    return model.cross_fitted


def test_every_user_is_in_one_fold_by_the_seed() -> None:
    folds = assign_folds(20, 3, 0)
    assert folds.dtype == np.int8 and sorted(np.bincount(folds).tolist()) == [6, 7, 7]
    assert (folds == assign_folds(20, 3, 0)).all() and (folds != assign_folds(20, 3, 1)).any()
    crossed = CrossFitted([], folds, None, None)
    assert crossed.of_users(np.array([4, 4, 19])).tolist() == [folds[4], folds[4], folds[19]]
    with pytest.raises(ValueError, match=r"CrossFitted: users must be in 0\.\.19, got 20"):
        crossed.of_users(np.array([3, 20]))


@pytest.mark.parametrize("folds", [[0, 2, -1, 1, 0, -1], [-1, 1, 1, 1, 1, 1], [2, 2, 0, 0, 1, 1], [-1] * 6, None])
def test_each_history_gets_the_states_of_its_fold(model: SASRec, folds: list[int] | None) -> None:
    given = None if folds is None else torch.tensor(folds)
    states = FrozenRecommender(model).states(_ITEMS, _BOUNDS, given)
    for row, fold in enumerate(folds or [-1] * 6):
        alone = torch.from_numpy(_HISTORIES[row]), torch.tensor([0, len(_HISTORIES[row])], dtype=torch.int32)
        expected = model.states(*alone) if fold < 0 else model.fold_states(*alone, fold)
        torch.testing.assert_close(states[_BOUNDS[row] : _BOUNDS[row + 1]], expected)
    assert not torch.allclose(model.fold_states(_ITEMS, _BOUNDS, 0), model.fold_states(_ITEMS, _BOUNDS, 1), atol=0.1)


def test_a_fold_that_does_not_exist_is_refused(model: SASRec) -> None:
    class Other:
        num_items, state_size, split_hash = 10, 8, None
        states = score = lambda self, items, cu_seqlens: torch.zeros(len(items), 8)

    with pytest.raises(ValueError, match=r"SASRec\.fold_states: fold must be one of 3, got 3"):
        model.fold_states(_ITEMS, _BOUNDS, 3)
    with pytest.raises(ValueError, match=r"SASRec\.fold_states: fold must be one of 0, got 0"):
        SASRec(10, width=8).fold_states(_ITEMS, _BOUNDS, 0)
    with pytest.raises(ValueError, match="recommender must have fold_states for rows with a fold, got a Other without"):
        FrozenRecommender(Other()).states(_ITEMS, _BOUNDS, torch.zeros(6, dtype=torch.int64))


def test_states_of_a_fold_are_brought_into_the_full_models_basis(model: SASRec) -> None:
    folds = folds_of(model)
    assert folds.bases is not None
    states = folds.models[2].states(_ITEMS, _BOUNDS)
    assert torch.equal(model.fold_states(_ITEMS, _BOUNDS, 2), states @ folds.bases[2])
    folds.bases = None
    assert torch.equal(model.fold_states(_ITEMS, _BOUNDS, 2), states)


def test_folds_follow_the_model_and_are_no_part_of_its_state(model: SASRec) -> None:
    folds = folds_of(model.double())
    assert all(value.dtype == torch.float64 for fold in folds.models for value in fold.parameters())
    assert model.fold_states(_ITEMS, _BOUNDS, 2).dtype == torch.float64
    assert model.state_dict().keys() == SASRec(10, width=8, num_layers=1).state_dict().keys()


def _record(folder: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((folder / "recommender.json").read_text())["folds"]
    return record


def test_folds_are_saved_and_loaded(model: SASRec, tmp_path: Path) -> None:
    save_recommender(model, tmp_path / "model")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = load_recommender(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.cross_fitted is not None and loaded.gap == _GAP
    for fold in range(3):
        assert torch.equal(loaded.fold_states(_ITEMS, _BOUNDS, fold), model.fold_states(_ITEMS, _BOUNDS, fold))
        assert not loaded.cross_fitted.models[fold].training
    assert (loaded.cross_fitted.user_folds == folds_of(model).user_folds).all()
    assert loaded.cross_fitted.user_folds.dtype == np.int8 and loaded.cross_fitted.split_hash == "a hash"
    assert _record(tmp_path / "model") == {"number": 3, "items": "aligned", "split_hash": "a hash"}


@pytest.mark.parametrize("items", ["own", "shared"])
def test_folds_of_older_versions_and_none_are_read(model: SASRec, items: str, tmp_path: Path) -> None:
    """Without bases, and with the item embeddings of the full model, which are then not in the file."""
    folds = folds_of(model)
    folds.bases = None
    save_recommender(model, tmp_path / "model")
    assert _record(tmp_path / "model")["items"] == "own"
    if items == "shared":
        path, record = (tmp_path / "model" / f"recommender{end}" for end in ("_folds.safetensors", ".json"))
        save_file({name: value for name, value in load_file(path).items() if "item_embedding" not in name}, path)
        record.write_text(record.read_text().replace('"own"', '"shared"'))
        seal(tmp_path / "model")
        for fold in folds.models:
            fold.item_embedding = model.item_embedding
    for _ in range(2):  # and once more, saved by this version
        loaded = load_recommender(tmp_path / "model")
        assert torch.equal(loaded.fold_states(_ITEMS, _BOUNDS, 1), model.fold_states(_ITEMS, _BOUNDS, 1))
        save_recommender(loaded, tmp_path / "model")
    model.cross_fitted = model.gap = None
    save_recommender(model, tmp_path / "model")
    loaded = load_recommender(tmp_path / "model")
    assert _record(tmp_path / "model") is None and loaded.cross_fitted is None and loaded.gap is None


def test_damaged_folds_are_refused(model: SASRec, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        seal(tmp_path / "model")
        with pytest.raises(ValueError, match="load_recommender: " + message):
            load_recommender(tmp_path / "model")

    save_recommender(model, tmp_path / "model")
    path, record = tmp_path / "model" / "recommender_folds.safetensors", tmp_path / "model" / "recommender.json"
    whole, text = load_file(path), record.read_text()

    def changed(name: str, value: Tensor) -> None:
        save_file({**whole, name: value}, path)

    changed("1.norm.bias", torch.zeros(3))
    refused(r"recommender_folds.safetensors must hold 1\.norm\.bias of shape \(8,\).*, got shape \(3,\)")
    changed("3.norm.bias", torch.zeros(8))
    refused(r".* the weights of 3 folds of this sasrec, got missing \[\], unexpected \['3\.norm\.bias'\]")
    changed("bases", torch.zeros(3, 8, 7))
    refused(r"recommender_folds.safetensors must hold bases of shape \(3, 8, 8\).*, got shape \(3, 8, 7\)")
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
