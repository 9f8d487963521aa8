"""Training Laser end to end on a tiny data set: it learns, it repeats itself, and what it saves is what it had."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from laser_fast.config import LaserConfig, build_config
from laser_fast.data import PackedSequences
from laser_fast.files.sealed import seal
from laser_fast.laser.build import Inputs
from laser_fast.laser.model import LaserModel
from laser_fast.runs.checkpoint import Run
from laser_fast.training import stage2
from laser_fast.training.loop import EarlyStopping
from laser_fast.training.optimizer import warmup_cosine
from laser_fast.training.train import train_laser
from laser_fast.training.training_rows import RowSampler

LEARNING = {"pretrain": {"epochs": 0}, "optimizer": {"learning_rate": 0.03}}  # enough to learn the walk in seconds


def config_of(settings: dict[str, Any], **sections: dict[str, Any]) -> LaserConfig:
    return build_config(LaserConfig, {**settings, **{n: {**settings.get(n, {}), **s} for n, s in sections.items()}})


def log_of(config: LaserConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(
    staged_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[LaserConfig, LaserModel, Inputs]:
    output = str(tmp_path_factory.mktemp("finished") / "run")
    config = build_config(LaserConfig, staged_settings | {"output": output, "evaluation": {}})
    return config, *train_laser(config, progress=False)


def test_a_run_leaves_the_best_model_and_its_records(finished: tuple[LaserConfig, LaserModel, Inputs]) -> None:
    config, _, inputs = finished
    folder, model = Path(config.output), ["README.md", "items.json", "laser.json", "recommender.json", "seal.json"]
    model += [f"{name}.safetensors" for name in ("adapter", "items", "recommender", "rules")]
    assert {path.name for path in (folder / "checkpoint").iterdir()} == set(model)
    records = {"config.yaml", "environment.json", "metrics.jsonl", "finished.json"}
    assert {path.name for path in folder.iterdir()} == {"checkpoint"} | records
    log = log_of(config)
    stages = [("pretrain", 0), ("pretrain", 1), ("phase_a", -1), ("phase_a", 0), ("phase_a", 1), ("phase_b", 0)]
    assert [(entry["stage"], entry["epoch"]) for entry in log] == [*stages, ("phase_b", 1)]
    description = json.loads((folder / "checkpoint" / "laser.json").read_text())
    best = max(entry["validation_NDCG@10"] for entry in log if entry["stage"] != "pretrain")
    assert description["facts"]["validation"]["NDCG@10"] == best
    assert description["split_hash"] == inputs.split.hash
    assert sum(log[3]["load"]) == pytest.approx(2.0)  # k choices per item
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__


def test_loading_gives_the_model_that_was_saved(finished: tuple[LaserConfig, LaserModel, Inputs]) -> None:
    config, model, inputs = finished
    run = Run.load(config.output)
    assert run.config == config and run.inputs.split.hash == inputs.split.hash
    loaded, histories = run.model, inputs.split.test.histories
    assert torch.equal(loaded.encode_users(histories), model.encode_users(histories))
    assert torch.equal(loaded.item_matrix, model.item_matrix)
    question = [["i1", "i2"], []]
    assert loaded.recommend(question) == model.recommend(question)
    assert bool(torch.isfinite(loaded.encode_users(PackedSequences.from_lists([[], []]))).all())
    assert loaded.calibration is not None and model.calibration is not None
    assert loaded.calibration.calibration == model.calibration.calibration


def test_training_lowers_the_loss_and_beats_the_start(tiny_settings: dict[str, Any]) -> None:
    training = {**LEARNING, "phase_a": {"epochs": 12, "patience": 12}, "phase_b": {"epochs": 0}}
    own = {"sequential_rules": False, "neighbors": False}  # which know these users as well as anybody can
    config = config_of(tiny_settings, bituning={"readout": "mean"}, training=training, evaluation=own)
    train_laser(config, progress=False)
    phase_a = [entry for entry in log_of(config) if entry["stage"] == "phase_a"]
    assert phase_a[-1]["cross_entropy"] < 0.9 * phase_a[1]["cross_entropy"]
    assert max(entry["validation_NDCG@10"] for entry in phase_a) > phase_a[0]["validation_NDCG@10"] + 0.1


@pytest.mark.parametrize(
    ("left_out", "name"),
    [("recommender_score", "recommender"), ("sequential_rules", "rules"), ("neighbors", "neighbors")],
)
def test_parts_of_the_calibrated_score_can_be_left_out(
    tiny_settings: dict[str, Any], left_out: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"pretrain": {"epochs": 0}, "phase_a": {"epochs": 0}, "phase_b": {"epochs": 0}}
    config = config_of(tiny_settings, training=training, evaluation={left_out: False})
    fitted: list[Mapping[str, float]] = []
    search = stage2.fit_calibration

    def watched(*arguments: Any, **options: Any) -> Any:
        found = search(*arguments, **options)
        fitted.append(found[0].calibration.weights)
        return found

    monkeypatch.setattr(stage2, "fit_calibration", watched)
    model, inputs = train_laser(config, progress=False)
    assert model.calibration is not None and set(fitted[0]) == {"laser", "recommender", "rules", "neighbors"} - {name}
    unused = {part for part in ("rules", "neighbors") if part in fitted[0] and not fitted[0][part]}
    assert set(model.calibration.components) == set(fitted[0]) - unused
    loaded = Run.load(config.output).model
    assert loaded.calibration is not None and loaded.calibration.calibration == model.calibration.calibration
    histories = (
        torch.from_numpy(inputs.split.test.histories.items),
        torch.from_numpy(inputs.split.test.histories.cu_seqlens),
    )
    assert torch.equal(loaded.calibration.score(*histories), model.calibration.score(*histories))


def test_phase_b_keeps_the_item_matrix(tiny_settings: dict[str, Any]) -> None:
    training = {**LEARNING, "phase_a": {"epochs": 0}, "phase_b": {"epochs": 6, "patience": 6}}
    own = {"sequential_rules": False, "neighbors": False}
    config = config_of(tiny_settings, bituning={"readout": "mean"}, training=training, evaluation=own)
    model, _ = train_laser(config, progress=False)
    description = json.loads((Path(config.output) / "checkpoint" / "laser.json").read_text())
    assert description["facts"]["stage"] == "phase_b"  # the user side alone got better than the untrained model
    kept = model.item_matrix.clone()
    assert not torch.allclose(model.refresh_items(), kept, atol=1e-4)


def test_damaged_and_foreign_checkpoints_are_refused(tiny_settings: dict[str, Any]) -> None:
    config = config_of(tiny_settings, bituning={"prefix": "shared"}, training={"pretrain": {"epochs": 0}})
    train_laser(config, progress=False)
    adapter = Path(config.output) / "checkpoint" / "adapter.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"adapter\.safetensors of .*checkpoint must be the file that was written"):
        Run.load(config.output)
    seal(adapter.parent)
    with pytest.raises(ValueError, match="adapter.safetensors must be a whole safetensors file"):
        Run.load(config.output)
    save_file({name: value for name, value in load(whole).items() if name != "head.bias"}, adapter)
    seal(adapter.parent)
    with pytest.raises(ValueError, match="(?s)must fit the configuration, got .*head.bias"):
        Run.load(config.output)
    adapter.write_bytes(whole)
    description = json.loads((adapter.parent / "laser.json").read_text())
    (adapter.parent / "laser.json").write_text(json.dumps(description | {"split_hash": "0" * 64}))
    seal(adapter.parent)
    with pytest.raises(ValueError, match="must be the split of the training, 000000000000, got"):
        Run.load(config.output)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Run.load(adapter.parent.parent / "elsewhere")


def test_rows_come_once_before_any_comes_twice() -> None:
    sampler = RowSampler(10, 4, seed=3)
    drawn = np.concatenate([sampler.epoch(index) for index in range(5)])
    assert sorted(drawn[:10].tolist()) == list(range(10))
    assert sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert np.array_equal(RowSampler(10, 4, seed=3).epoch(2), sampler.epoch(2))
    assert [len(batch) for batch in RowSampler(10, None, seed=0).batches(0, 4)] == [4, 4, 2]


def test_early_stopping_counts_epochs_without_a_better_value() -> None:
    stopping = EarlyStopping(patience=2)
    assert stopping.improved(0.1, 0) and not stopping.improved(0.1, 1) and not stopping.stop
    assert not stopping.improved(0.05, 2) and stopping.stop
    assert stopping.improved(0.2, 3) and not stopping.stop and stopping.best_epoch == 3


def test_learning_rate_rises_then_falls_to_zero() -> None:
    factor = warmup_cosine(100, 0.1)
    values = [factor(step) for step in range(101)]
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)
    assert 0 < values[0] < 0.2 and values[10] == pytest.approx(1.0) and values[100] == pytest.approx(0.0, abs=1e-12)
