"""A run that goes on from a state is the run that never stopped: bit by bit, wherever and however it was ended."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from laser_fast.cli import main
from laser_fast.config import LaserConfig, build_config, dump_config
from laser_fast.data import SequenceDataset, leave_one_out, training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.files.locks import lock_file
from laser_fast.laser.model import LaserModel
from laser_fast.runs.resume import StateFolder
from laser_fast.runs.run_directory import RunDirectory
from laser_fast.training.interruption import Interrupted
from laser_fast.training.loop import StageTrainer
from laser_fast.training.train import train_laser
from laser_fast.training.training_rows import RowSampler

Same = Callable[[Path, Path], None]
KNOWN = ("split", "item map", "recommender")


class Killed(BaseException):
    """Stands for whatever ends a process in the midst of a step."""


CLEAR = StateFolder.clear  # which most tests do without


@pytest.fixture(scope="module")
def settings(staged_settings: dict[str, Any]) -> dict[str, Any]:
    return staged_settings


def config_of(settings: dict[str, Any], output: Path, **training: Any) -> LaserConfig:
    values = {**settings, "output": str(output), "training": {**settings["training"], **training}}
    return build_config(LaserConfig, values)


@pytest.fixture(scope="module")
def states_stay() -> Iterator[None]:
    """A finished run deletes its states; here they stay, to be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateFolder, "clear", lambda self: None)
        yield


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, states_stay: None) -> Path:
    """The run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with calls_of_the_loss() as calls:
        train_laser(config_of(settings, output), progress=False)
    assert len(calls) == 17
    return output


def newest_state(run: Path) -> Path:
    return max((run / "states").iterdir())


@contextmanager
def calls_of_the_loss(act: Callable[[int], None] = lambda call: None) -> Iterator[list[int]]:
    """Call `act` with the number of every call of the loss, before its gradients are added."""
    calls: list[int] = []
    backward = StageTrainer._backward

    def counted(self: StageTrainer, part: PackedBatch, share: float, loss_function: Any) -> Any:
        def loss(batch: PackedBatch) -> dict[str, Tensor]:
            calls.append(len(calls))
            act(calls[-1])
            values: dict[str, Tensor] = loss_function(batch)
            return values

        return backward(self, part, share, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "_backward", counted)
        yield calls


def kill(config: LaserConfig, at: int, *, resume: bool = False) -> None:
    """Run until a call of the loss, in which the run ends."""

    def act(call: int) -> None:
        if call == at:
            raise Killed

    with calls_of_the_loss(act), pytest.raises(Killed):
        train_laser(config, resume=resume, progress=False)


# calls 0 to 3 are stage 1, 4 to 10 phase A, 11 to 16 phase B; there first steps of an epoch have several micro-batches
@pytest.mark.filterwarnings("ignore:train_laser. .* has no state yet")
@pytest.mark.parametrize(("at", "save_steps"), [(0, None), (1, 1), (5, 1), (9, 2), (12, 1)])
def test_a_resumed_run_is_the_run_that_never_stopped(
    settings: dict[str, Any], assert_same_run: Same, whole: Path, tmp_path: Path, at: int, save_steps: int | None
) -> None:
    config = config_of(settings, tmp_path / "run", save_steps=save_steps)
    kill(config, at)
    train_laser(config, resume=True, progress=False)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.filterwarnings("ignore:train_laser. .* has no state yet")
def test_the_text_stage_goes_on_with_its_best_weights(
    settings: dict[str, Any], assert_same_run: Same, states_stay: None, tmp_path: Path
) -> None:
    text = {"epochs": 3, "rows_per_epoch": 16, "batch_size": 8, "patience": 3}
    stages = {"text": text, "pretrain": {"epochs": 0}, "phase_b": {"epochs": 0}}
    with_text = {**settings, "text": {"residual": True, "item_side": "text"}}
    train_laser(config_of(with_text, tmp_path / "whole", **stages), progress=False)
    log = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["best"] for line in log if line["stage"] == "text"] == [True, False, False]  # the first is kept
    for at in (1, 3, 6):  # in the first epoch, in the second, in phase A
        config = config_of(with_text, tmp_path / f"run{at}", save_steps=1, **stages)
        kill(config, at)
        train_laser(config, resume=True, progress=False)
        assert_same_run(tmp_path / f"run{at}", tmp_path / "whole")


def test_a_halved_budget_stays_halved(settings: dict[str, Any], assert_same_run: Same, tmp_path: Path) -> None:
    backward, calls = StageTrainer._backward, []

    def full_once(self: StageTrainer, part: PackedBatch, *rest: Any) -> Any:
        calls.append(len(part))
        if len(calls) == 5:  # the first of phase A
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return backward(self, part, *rest)

    runs = [config_of(settings, tmp_path / name, halve_on_oom=True, save_steps=1) for name in ("whole", "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "_backward", full_once)
        with pytest.warns(UserWarning, match="is taken again"):
            train_laser(runs[0], progress=False)
        calls.clear()
        with pytest.warns(UserWarning, match="is taken again"):
            kill(runs[1], 11)
    train_laser(runs[1], resume=True, progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_in_a_step_lets_it_finish(
    settings: dict[str, Any], assert_same_run: Same, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = config_of(settings, tmp_path / "run")
    before = signal.getsignal(number)
    with (
        calls_of_the_loss(lambda call: os.kill(os.getpid(), number) if call == 4 else None) as calls,
        pytest.raises(Interrupted, match=f"training was stopped by {number.name}") as stop,
    ):
        train_laser(config, progress=False)
    assert stop.value.exit_status == 128 + number and signal.getsignal(number) == before
    assert len(calls) == 6  # both micro-batches of the step
    assert newest_state(tmp_path / "run").name == "000004-phase_a-0-1"
    train_laser(config, resume=True, progress=False)
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_while_the_catalogue_is_encoded_loses_no_step(
    settings: dict[str, Any], assert_same_run: Same, whole: Path, tmp_path: Path
) -> None:
    config = config_of(settings, tmp_path / "run")
    refresh, seen = LaserModel.refresh_items, []

    def refresh_items(self: LaserModel, **options: Any) -> Tensor:
        seen.append(1)
        if len(seen) == 2:  # after the first epoch of phase A
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal did not stop it")
        return refresh(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LaserModel, "refresh_items", refresh_items)
        with pytest.raises(Interrupted):
            train_laser(config, progress=False)
    assert newest_state(tmp_path / "run").name == "000004-phase_a-0-2"
    train_laser(config, resume=True, progress=False)
    assert_same_run(tmp_path / "run", whole)


def test_a_loss_that_is_not_finite_names_users_and_leaves_the_last_state(
    settings: dict[str, Any], assert_same_run: Same, whole: Path, tmp_path: Path
) -> None:
    config = config_of(settings, tmp_path / "run", save_steps=1)
    forward, seen, users = LaserModel.forward, [], []

    def broken(self: LaserModel, batch: PackedBatch, **step: Any) -> Any:
        output = forward(self, batch, **step)
        seen.append(len(batch))
        return output._replace(loss=output.loss * float("nan")) if len(seen) == 4 else output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LaserModel, "forward", broken)
        expected = r"training: the loss must be finite, got nan at step 2 in users \(training rows\) (.*); lower"
        with pytest.raises(FloatingPointError, match=expected) as error:
            train_laser(config, progress=False)
    users = re.findall(r"(u\d+) \((\d+)\)", str(error.value))
    rows = training_rows(leave_one_out(SequenceDataset.load(settings["data"])).train, 4)
    assert len(users) == seen[3]  # the micro-batch, not the whole batch
    assert [user for user, _ in users] == [f"u{rows.users[int(row)]}" for _, row in users]
    drawn = RowSampler(len(rows), 24, seed=1).epoch(1)[:16]
    assert {int(row) for _, row in users} <= set(drawn.tolist())
    train_laser(config, resume=True, progress=False)
    assert_same_run(tmp_path / "run", whole)


def test_a_gradient_that_is_not_finite_moves_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    forward = LaserModel.forward

    def broken(self: LaserModel, batch: PackedBatch, **step: Any) -> Any:
        output = forward(self, batch, **step)
        return output._replace(loss=output.loss + (output.loss * 0.0).sqrt())  # whose gradient is infinity times 0

    config = config_of(settings, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LaserModel, "forward", broken)
        with pytest.raises(FloatingPointError, match=r"the gradient must be finite, got nan at step 0 in users .*u\d"):
            train_laser(config, progress=False)


@pytest.fixture(scope="module")
def stopped(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, states_stay: None) -> Path:
    """A run that was killed in the second epoch of phase B, its states those of the two epochs before."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    kill(config_of(settings, output), 14)
    assert [folder.name for folder in sorted((output / "states").iterdir())] == [
        "000005-phase_a-2-4",
        "000006-phase_b-1-2",
    ]
    return output


def test_a_truncated_state_is_passed_over(
    settings: dict[str, Any], assert_same_run: Same, whole: Path, stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    (run / ".checkpoint.0123456789ab.partial").mkdir()  # what a kill in the midst of saving leaves
    shutil.copytree(run / "checkpoint", run / ".checkpoint.0123456789ab.old")
    for file in (run / "checkpoint").iterdir():
        file.write_bytes(b"of phase B, which the state before it must not see")
    tensors = newest_state(run) / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    message = (
        r"a state must be whole, got 000006-phase_b-1-2 \(SealedFolder: tensors.safetensors of .* bytes, got .*\); "
        "000005-phase_a-2-4 is used, the last good one"
    )
    with pytest.warns(UserWarning, match=message):
        train_laser(config_of(settings, run), resume=True, progress=False)
    assert_same_run(run, whole)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("seal.json", b'{"format": 1, "fil', r"SealedFolder: seal.json of .* must be JSON"),
        ("seal.json", None, r"SealedFolder: .* must have seal.json, got none"),
        ("state.json", b'{"format": 1}', r"SealedFolder: state.json of .* must be the file that was written"),
        ("values.json", b"{}", r"SealedFolder: values.json of .* must be the file that was written"),
        ("best/adapter.safetensors", None, r"SealedFolder: .* must be whole, got no best/adapter.safetensors"),
    ],
)
def test_damage_is_named_and_never_loaded(
    settings: dict[str, Any], stopped: Path, tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for folder in (run / "states").iterdir():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    before = (run / "metrics.jsonl").read_bytes()
    folder = RunDirectory(run, config_of(settings, run), resume=True).states
    with pytest.raises(ValueError, match=rf"000006-phase_b-1-2 \({problem}.*\); 000005-.*, and there is no other"):
        folder.newest()
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused(settings: dict[str, Any], stopped: Path) -> None:
    differences = "training.batch_size = 8 instead of 16, training.seed = 5 instead of 0$"
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    with pytest.raises(ValueError, match=f"with the configuration it began with, got {differences}"):
        train_laser(config_of(settings, stopped, seed=5, batch_size=8, save_steps=7), resume=True, progress=False)
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before


def test_other_data_are_refused(settings: dict[str, Any], stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (stopped / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("laser_fast.training.train.fingerprint", lambda inputs: dict.fromkeys(KNOWN, "0"))
    with pytest.raises(ValueError, match="what it began with, got another split and item map and recommender"):
        train_laser(config_of(settings, stopped), resume=True, progress=False)
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_a_run_that_does_not_exist_is_not_started(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="output must hold the run to resume, got .*without a config.yaml"):
        train_laser(config_of(settings, tmp_path / "nowhere"), resume=True, progress=False)
    assert not (tmp_path / "nowhere").exists()


def test_a_finished_run_stays_as_it_is(
    settings: dict[str, Any], assert_same_run: Same, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    model, _ = train_laser(config_of(settings, whole), resume=True)
    assert torch.equal(model.item_matrix, load_file(whole / "checkpoint" / "items.safetensors")["item_matrix"])
    (tmp_path / "run.yaml").write_text(dump_config(config_of(settings, whole)))
    assert main(["train", str(tmp_path / "run.yaml"), "--resume"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "is finished: nothing is left" in line]
    assert len(printed) == 2
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_what_a_kill_left_after_the_end_goes(
    settings: dict[str, Any], assert_same_run: Same, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateFolder, "clear", CLEAR)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert (run / "states").exists()
    lock_file(run).touch()
    (tmp_path / "run.yaml").write_text(dump_config(config_of(settings, run)))
    assert main(["train", str(tmp_path / "run.yaml"), "--resume"]) == 0
    assert not (run / "states").exists() and sorted(tmp_path.iterdir()) == [run, tmp_path / "run.yaml"]
    assert_same_run(run, whole)
