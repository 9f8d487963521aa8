"""What is made of the weights is never used with others: it is refused by name or made anew."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laser_fast.config import LaserConfig, build_config
from laser_fast.data import PackedSequences
from laser_fast.laser import LaserModel
from laser_fast.models.objective import LaserOutput
from laser_fast.recommenders import SASRec
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration
from laser_fast.runs.checkpoint import Run, save_laser
from laser_fast.training.train import train_laser

HISTORIES = [["i3", "i4"], [], ["i9"]]
PACKED = torch.tensor([3, 4, 9]), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
OUTDATED = (
    r"LaserModel: the item matrix must belong to the present weights, got one of older weights; call refresh_items"
)


def step(model: LaserModel, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **kind: Any) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.encode(model.builder.histories(PackedSequences.from_lists([[1, 2]])))[0].square().sum().backward()
    optimizer(trained, lr=0.1, **kind).step()


def write_to_the_language_model(model: LaserModel) -> None:
    with torch.no_grad():
        next(model.lm.model.parameters()).mul_(1.5)


def write_to_the_recommender(model: LaserModel) -> None:
    assert model.recommender is not None
    with torch.no_grad():
        next(model.recommender.parameters()).mul_(1.5)


CHANGES: dict[str, Callable[[LaserModel], object]] = {
    "step": step,
    "fused step": lambda model: step(model, fused=True),
    "loaded": lambda model: model.load_state_dict({n: v + 0.1 for n, v in model.state_dict().items()}),
    "part": lambda model: setattr(model, "head", torch.nn.Linear(16, 16)),
    "language model": write_to_the_language_model,
    "recommender": write_to_the_recommender,
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_reader_takes_an_older_item_matrix(
    model: LaserModel, tiny_settings: dict[str, Any], tmp_path: Path, name: str
) -> None:
    config = build_config(LaserConfig, tiny_settings)
    index, users = model.index(), PackedSequences.from_lists([[3, 4]])
    batch = replace(model.builder.histories(users), targets=torch.tensor([5]))

    def loss() -> LaserOutput:
        with torch.no_grad():
            return model(batch)

    readers: dict[str, Callable[[], object]] = {
        "recommend": lambda: model.recommend(HISTORIES, 3),
        "score": lambda: model.score(*PACKED),
        "index": model.index,
        "save_pretrained": lambda: model.save_pretrained(tmp_path / "saved"),
        "save_laser": lambda: save_laser(model, config, tmp_path / "run", validation={}),
        "loss of an evaluation": loss,
    }
    before = loss().loss
    CHANGES[name](model)
    for reader in readers.values():
        with pytest.raises(RuntimeError, match=OUTDATED):
            reader()
    assert not list(tmp_path.glob("saved*")) and not list(tmp_path.glob("run*"))
    with pytest.raises(RuntimeError, match="the index must belong to the present weights"):
        index.search(users, 3)
    model(batch).loss.backward()  # a step of training may
    model.refresh_items()
    assert torch.equal(model.item_matrix, model.encode_items()) and not torch.equal(loss().loss, before)
    assert model.recommend(HISTORIES, 3) and model.index() is not index


def test_whoever_assigns_or_keeps_a_matrix_answers_for_it(model: LaserModel) -> None:
    step(model)
    model.keep_items()
    kept = model.recommend(HISTORIES, 3)
    step(model)
    model.item_matrix = model.item_matrix.clone()
    assert model.recommend(HISTORIES, 3) != kept
    step(model)
    assert model.items_are_outdated
    model.item_matrix = torch.empty(0, 16)
    assert not model.items_are_outdated
    with pytest.raises(RuntimeError, match=r"the item matrix must hold 25 items, got 0; call refresh_items\(\) first"):
        model.keep_items()


def moved(model: LaserModel) -> LaserModel:
    """As `model.to(device)` does it, where there is one device."""
    return model._apply(torch.clone)


def test_a_matrix_refreshed_by_another_thread_meanwhile_is_taken_up(
    model: LaserModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(model)
    older, find = model.item_matrix, model._any_items

    def be_slow() -> torch.Tensor:
        found = find()
        monkeypatch.undo()
        model.refresh_items()
        return found

    monkeypatch.setattr(model, "_any_items", be_slow)
    assert model.current_items() is model.item_matrix is not older


def test_moves_and_copies_are_no_change(model: LaserModel) -> None:
    model.calibration = CalibratedScorer({"laser": model}, Calibration({"laser": 1.0}), torch.ones(25))
    expected = model.recommend(HISTORIES, 3)
    for twin in (copy.copy(model), copy.deepcopy(model), moved(model)):
        assert twin.calibration is not None and twin.calibration.components["laser"] is twin
        assert [[one.item_id for one in best] for best in twin.recommend(HISTORIES, 3)] == [
            [one.item_id for one in best] for best in expected
        ]
    step(model)
    for twin in (copy.copy(model), copy.deepcopy(model), moved(model)):
        assert twin.items_are_outdated
        with pytest.raises(RuntimeError, match="the calibration must belong to the present weights"):
            twin.recommend(HISTORIES, 3)


def test_a_calibration_of_older_weights_is_refused(model: LaserModel, tmp_path: Path) -> None:
    model.calibration = CalibratedScorer({"laser": model}, Calibration({"laser": 1.0}, (), 2.0), torch.ones(25))
    expected = model.recommend(HISTORIES, 3)
    step(model)
    model.refresh_items()
    for reader in (
        lambda: model.recommend(HISTORIES, 3),
        model.index,
        lambda: model.calibration.score(*PACKED) if model.calibration else None,
        lambda: model.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"CalibratedScorer: the calibration must belong to the present weights, got one of older weights of "
            r"'laser'; fit it again \(laser_fast\.evaluation\.fit_calibration\), or set model\.calibration = None",
        ):
            reader()
    model.calibration = None
    assert model.recommend(HISTORIES, 3) != expected
    without = CalibratedScorer({"laser": model}, Calibration({"laser": 0.0}, (), 2.0), torch.ones(25))
    step(model)
    assert without.score(*PACKED).shape == (3, 25)  # no part of it is of these weights


def test_a_recommender_beside_the_model_is_of_one_version_too(model: LaserModel) -> None:
    other = SASRec(25, width=8)
    settings = Calibration({"laser": 0.1, "recommender": 1.0}, ("recommender",))
    model.calibration = CalibratedScorer({"laser": model, "recommender": other}, settings, torch.ones(25))
    expected, index, users = model.recommend(HISTORIES, 3), model.index(), PackedSequences.from_lists([[3, 4]])
    other._apply(torch.clone)  # as a move
    assert copy.deepcopy(model).recommend(HISTORIES, 3) == model.recommend(HISTORIES, 3) == expected
    assert model.index() is index
    torch.nn.init.normal_(other.item_embedding.weight)
    refused = "the calibration must belong to the present weights, got one of older weights of 'recommender'"
    with pytest.raises(RuntimeError, match=refused):
        model.recommend(HISTORIES, 3)
    with pytest.raises(RuntimeError, match="the index must belong to the present weights, got one of older weights"):
        index.search(users, 3)


def test_a_run_that_kept_its_items_comes_back_whole(tiny_settings: dict[str, Any]) -> None:
    training = {**tiny_settings["training"], "pretrain": {"epochs": 0}, "phase_a": {"epochs": 1}}
    settings = {**tiny_settings, "training": training | {"phase_b": {"epochs": 2}}}
    trained, _ = train_laser(build_config(LaserConfig, settings), progress=False)
    loaded = Run.load(settings["output"]).model
    for model in (trained, loaded):
        assert not model.items_are_outdated and model.recommend(HISTORIES, 3) == trained.recommend(HISTORIES, 3)


def test_text_vectors_follow_the_language_model_and_outdate_the_matrix(ready_laser: Callable[..., LaserModel]) -> None:
    model = ready_laser(text={"residual": True})
    assert model.text is not None
    before = model.text.vectors
    model.text.set_vectors(before.clone())
    assert not model.items_are_outdated
    model.text.set_vectors(before.flip(0))
    assert model.items_are_outdated
    model.text.set_vectors(before)
    model.refresh_items()
    write_to_the_language_model(model)
    model.refresh_items()
    assert torch.equal(model.text.vectors, before)  # they were set, so they are whoever's who set them
    other = ready_laser(text={"residual": True})
    assert other.text is not None
    read = other.text.vectors
    other.refresh_items()
    assert other.text.vectors is read
    write_to_the_language_model(other)
    other.refresh_items()
    assert not torch.equal(other.text.vectors, read)


def test_instructions_follow_the_language_model(model: LaserModel) -> None:
    first = model._instruction((1, 2))
    assert model._instruction((1, 2)) is first
    step(model)  # trains nothing that stands before an instruction
    assert model._instruction((1, 2)) is first
    write_to_the_language_model(model)
    assert not torch.equal(model._instruction((1, 2)).keys[0], first.keys[0])


def test_a_language_model_in_training_mode_is_refused(model: LaserModel) -> None:
    model.lm.model.train()
    with pytest.raises(RuntimeError, match=r"the language model must be in evaluation mode to answer, got training"):
        model.encode_items()
    model.lm.freeze()
    assert len(model.encode_items()) == 25
