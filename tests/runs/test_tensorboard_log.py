"""TensorBoard shows the log: every line once, also after a run went on, and only where the package is there."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from laser_fast.config import LaserConfig, build_config
from laser_fast.runs.run_directory import RunDirectory
from laser_fast.runs.tensorboard_log import TensorBoardLog, scalars
from laser_fast.training.train import train_laser

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")


def lines(*values: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads from the folder: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


FIRST = {"stage": "phase_a", "epoch": 0, "step": 4, "best": True, "loss": 2.5, "load": [0.25, 0.75]}
SECOND = {"stage": "phase_a", "epoch": 1, "step": 8, "best": False, "loss": 2.0, "load": [0.5, 0.5]}
OTHER = {"stage": "phase_a", "epoch": 1, "step": 8, "best": False, "loss": 1.0, "load": [0.5, 0.5]}


def test_scalars_of_a_line() -> None:
    untrained = {"stage": "phase_a", "epoch": -1, "best": True, "validation_NDCG@10": 0.5, "note": "text"}
    assert dict(scalars(untrained)) == {"phase_a/validation_NDCG_at_10": 0.5}
    assert dict(scalars(FIRST)) == {"phase_a/loss": 2.5, "phase_a/load/expert_1": 0.25, "phase_a/load/expert_2": 0.75}
    assert not dict(scalars({"stage": "out_of_memory", "failed_tokens": 9, "micro_batch_tokens": 4}))


@needs_tensorboard
def test_every_line_is_shown_once(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path / "curves")
    log.follow(lines(FIRST))
    log.follow(lines(FIRST, SECOND))
    log.close()
    assert shown(tmp_path / "curves")["phase_a/loss"] == [(4, 2.5), (8, 2.0)]
    again = TensorBoardLog(tmp_path / "curves")  # the run goes on in another process, from before the second line
    again.follow(lines(FIRST, OTHER))
    again.follow(lines(FIRST, SECOND, OTHER))  # as after a state was put back
    again.close()
    assert shown(tmp_path / "curves")["phase_a/loss"] == [(4, 2.5), (8, 2.0), (8, 1.0)]
    assert len(list((tmp_path / "curves").iterdir())) == 1


@needs_tensorboard
def test_training_writes_what_the_log_says(tiny_settings: dict[str, Any]) -> None:
    tiny_settings["training"]["tensorboard"] = True
    tiny_settings["evaluation"] = {"calibrate": False}
    train_laser(build_config(LaserConfig, tiny_settings), progress=False)
    run = Path(tiny_settings["output"])
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = shown(run / "tensorboard")
    for stage in ("pretrain", "phase_a", "phase_b"):
        expected = [(line["step"], round(line["loss"], 5)) for line in log if line["stage"] == stage and "step" in line]
        assert expected and curves[f"{stage}/loss"] == expected
    assert {"phase_a/validation_NDCG_at_10", "phase_a/load/expert_3", "phase_a/text_tokens_per_s"} <= set(curves)
    assert curves["phase_a/validation_NDCG_at_10"][0][0] == 0  # the untrained model


def test_a_missing_package_is_refused_before_anything_is_read(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    tiny_settings["training"]["tensorboard"] = True
    tiny_settings["data"] = "nowhere"  # loading it would fail first
    with pytest.raises(ImportError, match=r'needs the package tensorboard, got none; pip install "laser-fast\[tens'):
        train_laser(build_config(LaserConfig, tiny_settings), progress=False)
    assert not Path(tiny_settings["output"]).exists()


def test_tensorboard_may_be_switched_on_when_a_run_goes_on(tiny_settings: dict[str, Any]) -> None:
    RunDirectory(tiny_settings["output"], build_config(LaserConfig, tiny_settings)).begin()
    tiny_settings["training"]["tensorboard"] = True
    assert not RunDirectory(tiny_settings["output"], build_config(LaserConfig, tiny_settings), resume=True).finished
