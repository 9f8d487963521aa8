"""Two processes train as one does: the same losses, gradients and records; they stop, fail and go on together."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from laser_fast.config import LaserConfig, build_config
from laser_fast.processes import ALONE
from laser_fast.training.loop import StageTrainer
from laser_fast.training.train import train_laser

Same = Callable[[Path, Path], None]

_SCRIPT = Path(__file__).with_name("several_processes.py")
_TIMES = ("time_s", "text_tokens_per_s")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("several_processes", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(staged_settings: dict[str, Any]) -> dict[str, Any]:
    """No dropout; a last batch of one row, which leaves one process without any; negatives that both have."""
    stage = {"epochs": 1, "rows_per_epoch": 17}
    training = {"batch_size": 8, "pretrain": stage, "phase_a": stage, "phase_b": stage}
    return {
        **staged_settings,
        "mformer": {**staged_settings["mformer"], "dropout": 0.0},
        "bituning": {"dropout": 0.0},
        "training": training,
        "objective": {"num_negatives": 2, "matching_weight": 0.0},  # whose negatives a process draws from its own rows
        "evaluation": {"calibrate": True, "batch_size": 9},
    }


@pytest.fixture(scope="module")
def one(jobs: Any, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process; what it imports the others need not."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert jobs.train(0, settings, run) == [0]
    return run


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path, rank: int) -> Tensor:
    return torch.tensor([float(line) for line in (run.with_suffix(".notes") / f"losses-{rank}").read_text().split()])


def last_state(run: Path) -> dict[str, Tensor]:
    return load_file(max((run / "states").iterdir()) / "tensors.safetensors")


def printed_by(run: Path) -> list[str]:
    return [(run.with_suffix(".notes") / f"printed-{rank}").read_text() for rank in range(2)]


def test_two_processes_take_the_steps_of_one(jobs: Any, settings: dict[str, Any], one: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    assert jobs.train(2, settings, two) == [0, 0]
    losses = losses_of(one, 0)
    assert len(losses) == 9
    for rank in range(2):
        torch.testing.assert_close(losses_of(two, rank), losses, rtol=1e-6, atol=0)
    for expected, actual in zip(log_of(one), log_of(two), strict=True):
        assert actual.keys() == expected.keys()
        for name in expected.keys() - {"stage", *_TIMES}:
            assert actual[name] == pytest.approx(expected[name], rel=2e-6), name
    states = last_state(one), last_state(two)
    for name, expected in states[0].items():
        if name.startswith(("model/", "items/", "heads/")):
            torch.testing.assert_close(states[1][name], expected, rtol=1e-5, atol=1e-5, msg=name)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    printed = printed_by(two)
    assert "saved in" in printed[0] and printed[1] == ""
    assert jobs.train(2, settings, two) == [2, 2]
    printed = printed_by(two)
    assert "output must be a new or empty folder" in printed[0] and printed[1] == ""


def test_whatever_stops_one_stops_all_and_they_go_on_as_if_nothing_had(
    jobs: Any, staged_settings: dict[str, Any], one: Path, assert_same_run: Same, tmp_path: Path
) -> None:
    stage = {"epochs": 1, "rows_per_epoch": 24}
    stages = dict.fromkeys(("pretrain", "phase_a", "phase_b"), stage)
    settings = {**staged_settings, "training": {**staged_settings["training"], **stages}}  # dropout and micro-batches
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert jobs.train(2, settings, whole) == [0, 0]
    assert jobs.train(2, settings, run, disturb=(1, 3, "terminate")) == [143, 143]
    printed = printed_by(run)
    again = "go on with: torchrun --nproc-per-node=2 -m laser_fast train "
    assert f"stopped by SIGTERM; {again}" in printed[0] and not printed[1]
    in_one_process_the_streams_differ(settings, run, tmp_path / "alone")
    assert jobs.train(2, settings, run, "--resume", disturb=(1, 2, "nan")) == [2, 2]
    printed = printed_by(run)
    assert re.search(
        r"error: training: the loss must be finite, got nan at step \d in users .*u\d+ \(\d+\)", printed[1]
    )
    assert "error:" not in printed[0]
    assert all(jobs.train(2, settings, run, "--resume", disturb=(1, 2, "raise")))  # none hangs, none says all is well
    assert "this process broke" in printed_by(run)[1]
    assert jobs.train(2, settings, run, "--resume") == [0, 0]
    assert_same_run(run, whole)


def in_one_process_the_streams_differ(settings: dict[str, Any], run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    config = build_config(LaserConfig, {**settings, "output": str(copy)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "run_epoch", stop)
        expected = "resumed in as many processes as it had, 2, got 1; parameters go on"
        with pytest.warns(UserWarning, match=expected), pytest.raises(Stop):
            train_laser(config, resume=True, progress=False)


class Stop(BaseException):
    """Ends a run that is not to be watched any longer."""


def stop(*arguments: Any, **options: Any) -> None:
    raise Stop


def test_rows_of_others_count_as_in_one_process(jobs: Any, script: ModuleType, tmp_path: Path) -> None:
    assert jobs.run(2, tmp_path, numbers=True) == [0, 0]
    values = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in script.inputs().items()
    }
    loss = script.candidates_loss(values["users"], values["table"], values["targets"], ALONE)
    balance, load = script.balance(values, 0, 4, ALONE)
    (loss + balance).backward()
    for rank in range(2):
        found = load_file(tmp_path / f"numbers-{rank}.safetensors")
        for case in ("uneven", "empty"):
            assert found[f"{case}.loss"] == pytest.approx(loss.item(), rel=1e-12), case
            assert found[f"{case}.balance"] == pytest.approx(balance.item(), rel=1e-12), case
            torch.testing.assert_close(found[f"{case}.load"], load, rtol=1e-12, atol=0)
            for name in ("users", "table", "router", "bias", "states"):
                torch.testing.assert_close(found[f"{case}.grad_{name}"], values[name].grad, rtol=1e-10, atol=1e-14)
        assert found["apart"].tolist() == [rank]
        assert found["gathered"].tolist() == ([0, 1, 1], [1, 1, 0])[rank]  # its own first
        error = bytes(found["error"].tolist()).decode()
        together = "training: all processes must go on together, got an error in process 1: no such folder"
        assert error == (f"OtherProcessFailed: {together}", "ValueError: no such folder")[rank]
        assert not found["synchronized"].any()


def test_halving_is_refused_in_several_processes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    values = {**settings, "output": str(tmp_path / "run"), "training": {**settings["training"], "halve_on_oom": True}}
    with pytest.raises(ValueError, match="halve_on_oom must be false in several processes .*, got true"):
        train_laser(build_config(LaserConfig, values), progress=False)
