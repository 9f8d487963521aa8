"""The folder of a run: whose it is, what may lie in it, and that nothing it writes ends up elsewhere."""

import json
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_fast.cli import main
from laser_fast.config import LaserConfig, RecommenderConfig, build_config
from laser_fast.data import EvaluationRows, PackedSequences, Split
from laser_fast.runs.resume import State
from laser_fast.runs.run_directory import RunDirectory
from laser_fast.training import train as laser
from laser_fast.training.recommender.train_recommender import train_recommender
from laser_fast.training.train import train_laser

Elsewhere = Callable[[Path], AbstractContextManager[None]]
StartAtOnce = Callable[[int, Callable[[Callable[[], None]], object]], list[str]]
_CONFIG = RecommenderConfig(epochs=1, folds=0)
_REFUSED = "must be written by one process at a time, got '.*/run', at which another process is at work"
_LINKS = ["config.yaml", "environment.json", "metrics.jsonl", "finished.json", "checkpoint", "states", "tensorboard"]


class Stop(Exception):
    """Enough was seen."""


def _state(log_bytes: int = 0) -> State:
    return State.join(position=State(values={"stage": "s", "epoch": 1, "step": 2, "log_bytes": log_bytes}))


def _split() -> Split:
    histories = PackedSequences.from_lists([[0, 1, 2]] * 2)
    rows = EvaluationRows(np.arange(2), histories, np.array([3, 3]))
    return Split(histories, np.arange(2), rows, rows, "leave-one-out", "a hash")


def _raises_after(hold: Callable[[], None]) -> Callable[..., None]:
    def stop(*_: Any, **__: Any) -> None:
        hold()
        raise Stop

    return stop


def test_of_trainings_that_start_at_once_one_goes_on(
    start_at_once: StartAtOnce, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(LaserConfig, tiny_settings)

    def start(hold: Callable[[], None]) -> None:
        monkeypatch.setattr(laser, "load_inputs", _raises_after(hold))
        with pytest.raises(Stop):
            train_laser(config, progress=False)

    refused = start_at_once(8, start)
    assert len(refused) == 7 and all(re.search(_REFUSED, text) for text in refused)
    assert not list(tmp_path.iterdir())  # the one that went on stopped before there was anything to write


def test_a_command_that_comes_late_says_so_in_one_line(
    claimed_elsewhere: Elsewhere, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        ["recommender", "train", str(tiny_data), str(tmp_path / "run")],
        ["recommender", "import", "absent", str(tiny_data), str(tmp_path / "run"), "--kind", "recbole-sasrec"],
    ]
    for command in commands:
        with claimed_elsewhere(tmp_path / "run"):
            assert main(command) == 2
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and re.search(_REFUSED, lines[0])
            assert not (tmp_path / "run").exists()


def test_what_ended_before_its_first_state_is_no_obstacle(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunDirectory(run, _CONFIG).begin().log(epoch=0)
    (run / "states").mkdir()
    (run / "states" / ".000001-a-0-0.0123456789ab.partial").mkdir()
    (run / ".config.yaml.0123456789ab.partial").write_text("half")
    (run / "tensorboard").mkdir()
    other = _CONFIG.model_copy(update={"epochs": 2})
    RunDirectory(run, other).begin()
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "environment.json"]
    assert "epochs: 2" in (run / "config.yaml").read_text()


@pytest.mark.parametrize(
    "names",
    [
        ["config.yaml"],
        ["environment.json", ".checkpoint.0123456789ab.old"],
        ["environment.json", "notes.txt"],
        ["environment.json", "checkpoint"],
        ["metrics.jsonl"],
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_what_could_be_lost_is_an_obstacle(tmp_path: Path, names: list[str], resume: bool) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    error = (FileExistsError, FileNotFoundError, ValueError) if resume else FileExistsError
    with pytest.raises(
        error, match="must be a new or empty folder|must hold the run to resume|the configuration it began"
    ):
        RunDirectory(tmp_path, _CONFIG, resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_state_is_an_obstacle_until_it_is_resumed(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run", _CONFIG).begin().states.save(_state())
    with pytest.raises(FileExistsError, match="output must be a new or empty folder, got '.*/run'"):
        RunDirectory(tmp_path / "run", _CONFIG)
    assert RunDirectory(tmp_path / "run", _CONFIG, resume=True).states.newest() is not None


@pytest.mark.parametrize("left", [[], ["environment.json"], [".environment.json.0123456789ab.partial"]])
def test_a_run_killed_as_it_began_is_resumed_from_nothing(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text("{}")
    RunDirectory(tmp_path, _CONFIG, resume=True, writes=False).begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    RunDirectory(tmp_path, _CONFIG, resume=True).begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "environment.json"]
    assert json.loads((tmp_path / "environment.json").read_text())["python"]


def test_a_half_line_is_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, _CONFIG).begin()
    run.log(epoch=0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epo')
    assert run.read_log() == b'{"epoch": 0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epo')
    assert run.read_log() == b""


@pytest.mark.parametrize("name", _LINKS)
def test_a_link_in_a_run_is_refused_by_name(tmp_path: Path, name: str) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    RunDirectory(run, _CONFIG).begin().log(epoch=0)
    if (run / name).exists():
        (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    with pytest.raises(FileExistsError, match=f"got the link '{name}' in '.*/run'|must be a new or empty folder"):
        RunDirectory(run, _CONFIG)
    with pytest.raises((FileExistsError, FileNotFoundError), match=f"got the link '{name}'|without a config.yaml"):
        RunDirectory(run, _CONFIG, resume=True)
    assert (elsewhere.read_bytes() if elsewhere.exists() else None) == before


def test_a_link_that_comes_later_is_replaced(tmp_path: Path) -> None:
    """A training that has gone on for hours does not end over it, and what it points to stays as it is."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    directory = RunDirectory(tmp_path / "run", _CONFIG).begin()
    states = directory.states
    for name in ("states", "checkpoint", "metrics.jsonl", "finished.json"):
        (directory.path / name).symlink_to(elsewhere)
    states.put_back_files()
    directory.log(epoch=0)
    states.save(_state(log_bytes=13))
    directory.finish()
    states.clear()
    assert [path.read_text() for path in elsewhere.iterdir()] == ["precious"]
    assert sorted(path.name for path in directory.path.iterdir()) == [
        "config.yaml",
        "environment.json",
        "finished.json",
        "metrics.jsonl",
    ]
    assert not any(path.is_symlink() for path in directory.path.iterdir())


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to one that is to be made"])
def test_the_output_itself_may_be_a_link(tmp_path: Path, there: bool) -> None:
    disk = tmp_path / "disk" / "run"
    if there:
        disk.mkdir(parents=True)
    (tmp_path / "run").symlink_to(disk)
    train_recommender(_split(), 5, _CONFIG, seed=0, run_dir=tmp_path / "run", progress=False)
    assert (disk / "checkpoint" / "recommender.json").is_file() and (tmp_path / "run").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "run"]


def test_modes_of_a_run_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train_recommender(_split(), 5, _CONFIG, seed=0, run_dir=tmp_path / "run", progress=False)
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o7777 == (0o750 if path.is_dir() else 0o640), path


def test_what_lies_there_decides_what_is_advised(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("precious")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_text("precious")
    RunDirectory(tmp_path / "run", _CONFIG).begin().states.save(_state())
    advice = {
        "log.csv": "which is a file; choose another",
        "photos": "which holds something else; choose another",
        "run": "where a run was begun; go on with it (--resume), or choose another",
    }
    for name, told in advice.items():
        with pytest.raises(FileExistsError) as caught:
            RunDirectory(tmp_path / name, _CONFIG)
        assert str(caught.value).endswith(told) and "remove" not in str(caught.value)
