"""A recommender whose training was stopped, wherever that was, becomes the one that was never stopped, bit by bit."""

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_fast.cli import main
from laser_fast.config import RecommenderConfig
from laser_fast.data import EvaluationRows, PackedSequences, Split
from laser_fast.recommenders.recommender_files import load_recommender, save_recommender
from laser_fast.runs.resume import StateFolder
from laser_fast.training.interruption import Interrupted
from laser_fast.training.recommender import run as recommender_run
from laser_fast.training.recommender.fit import Fitting, Windows
from laser_fast.training.recommender.train_recommender import train_recommender

_NUM_ITEMS = 12
_CONFIG = RecommenderConfig(
    width=8, num_layers=1, max_length=5, batch_size=8, learning_rate=0.02, epochs=2, patience=2, folds=2, dropout=0.2
)
_EPOCHS = 6  # of the model and of both folds


class Killed(BaseException):
    """Stands for whatever ends a process in the midst of a step."""


def _split(seed: int = 0) -> Split:
    generator = np.random.default_rng(seed)
    cycle = generator.permutation(_NUM_ITEMS)  # to be learned, so that later epochs are better
    walks = [cycle[(start + np.arange(length)) % _NUM_ITEMS] for start, length in generator.integers(4, 9, (30, 2))]

    def rows(back: int) -> EvaluationRows:
        histories = PackedSequences.from_lists([walk[:-back] for walk in walks])
        return EvaluationRows(np.arange(30), histories, np.array([walk[-back] for walk in walks], dtype=np.int64))

    train = PackedSequences.from_lists([walk[:-2] for walk in walks])
    return Split(train, np.arange(30), rows(2), rows(1), "leave-one-out", f"hash {seed}")


def _train(folder: Path, config: RecommenderConfig = _CONFIG, *, seed: int = 3, **options: Any) -> None:
    train_recommender(
        options.pop("split", _split()), _NUM_ITEMS, config, seed=seed, run_dir=folder, progress=False, **options
    )


@contextmanager
def _calls(act: Callable[[int], None], owner: Any, name: str) -> Iterator[list[int]]:
    """Call `act` with the number of every call of a method, before it."""
    calls: list[int] = []
    method = getattr(owner, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(len(calls))
        act(calls[-1])
        return method(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield calls


def _kill(folder: Path, at: int, owner: Any, name: str, config: RecommenderConfig = _CONFIG, **options: Any) -> None:
    def act(call: int) -> None:
        if call == at:
            raise Killed

    with _calls(act, owner, name), pytest.raises(Killed):
        _train(folder, config, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped: 2 epochs of the model, then 2 of each of two folds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with _calls(lambda call: None, Fitting, "epoch") as calls:
        _train(folder)
    assert len(calls) == _EPOCHS
    return folder


def _assert_same(run: Path, whole: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for path in (whole / "checkpoint").iterdir():
        assert (run / "checkpoint" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.filterwarnings("ignore:train_recommender. .* has no state yet")
@pytest.mark.parametrize("at", range(_EPOCHS))
def test_killed_in_any_epoch_it_goes_on(whole: Path, tmp_path: Path, at: int) -> None:
    _kill(tmp_path / "run", at, Fitting, "epoch")
    before = random.getstate()
    _train(tmp_path / "run", resume=True)
    assert random.getstate() == before
    _assert_same(tmp_path / "run", whole)


@pytest.mark.filterwarnings("ignore:train_recommender. .* has no state yet")
@pytest.mark.parametrize("kind", ["sasrec", "gru4rec"])
def test_killed_again_and_again_within_steps(tmp_path: Path, kind: str) -> None:
    """At seeded optimizer steps, of which the run has many more."""
    config = _CONFIG.model_copy(update={"kind": kind})
    draws = random.Random(kind)
    with _calls(lambda call: None, Windows, "batch") as steps:
        _train(tmp_path / "whole", config)
    _kill(tmp_path / "run", draws.randrange(len(steps) // 2), Windows, "batch", config)
    _kill(tmp_path / "run", draws.randrange(len(steps) // 4), Windows, "batch", config, resume=True)
    _train(tmp_path / "run", config, resume=True)
    _assert_same(tmp_path / "run", tmp_path / "whole")


def test_whose_patience_ran_out_learns_no_more(tmp_path: Path) -> None:
    config = _CONFIG.model_copy(update={"epochs": 4, "patience": 1, "learning_rate": 1e-7})  # no epoch is any better
    _train(tmp_path / "whole", config)
    _kill(tmp_path / "run", 2, Fitting, "epoch", config)
    newest = max((tmp_path / "run" / "states").iterdir())
    assert newest.name.startswith("000002-model-2-")
    _train(tmp_path / "run", config, resume=True)
    _assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(recommender_run, "save_recommender"), (StateFolder, "clear")],
    ids=["before the checkpoint", "after the checkpoint"],
)
def test_killed_at_the_end(whole: Path, tmp_path: Path, owner: Any, name: str) -> None:
    _kill(tmp_path / "run", 0, owner, name)
    with _calls(lambda call: None, Fitting, "epoch") as calls:
        _train(tmp_path / "run", resume=True)
    assert calls == []
    _assert_same(tmp_path / "run", whole)


def test_a_finished_one_stays_as_it_is(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    model = train_recommender(_split(), _NUM_ITEMS, _CONFIG, seed=3, run_dir=whole, resume=True, progress=False)
    expected = load_recommender(whole)
    assert all((value == expected.state_dict()[name]).all() for name, value in model.state_dict().items())
    assert model.cross_fitted is not None and not model.training
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_signal_stops_an_epoch_which_is_taken_again(whole: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def act(call: int) -> None:
        if call == 3:  # the last of the first fold
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal did not stop it")

    with _calls(act, Fitting, "epoch"), pytest.raises(Interrupted):
        _train(tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before
    _train(tmp_path / "run", resume=True)
    _assert_same(tmp_path / "run", whole)


@pytest.mark.filterwarnings("ignore:train_recommender. .* has no state yet")
def test_the_command_goes_on_after_a_signal(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "epochs=2", "--set", "width=8", "--set", "num_layers=1", "--folds", "0"]
    command = ["recommender", "train", str(tiny_data), str(tmp_path / "run"), *settings]
    with _calls(lambda call: os.kill(os.getpid(), signal.SIGTERM), Fitting, "epoch"):
        assert main(command) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command with --resume goes on" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--resume"]) == 0  # finished: only loaded
    assert load_recommender(tmp_path / "run").split_hash


def test_other_data_or_another_seed_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with what it began with, got another seed$"):
        _train(whole, seed=4, resume=True)  # finished, but by another seed
    _kill(tmp_path / "run", 1, Fitting, "epoch")
    with pytest.raises(ValueError, match="with what it began with, got another seed$"):
        _train(tmp_path / "run", seed=4, resume=True)
    with pytest.raises(ValueError, match="with what it began with, got another split$"):
        _train(tmp_path / "run", split=_split(1), resume=True)
    with pytest.raises(ValueError, match="the configuration it began with, got epochs = 3 instead of 2"):
        _train(tmp_path / "run", _CONFIG.model_copy(update={"epochs": 3}), resume=True)


def test_a_checkpoint_that_no_run_wrote_is_not_its_own(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    model = load_recommender(run)
    save_recommender(model, run / "checkpoint")
    with pytest.raises(ValueError, match="with what it began with, got another split and number of items and seed$"):
        _train(run, resume=True)


def test_what_others_put_among_the_states_is_none(whole: Path, tmp_path: Path) -> None:
    _kill(tmp_path / "run", 2, Fitting, "epoch")
    for name in ("1abc", "\N{SUPERSCRIPT TWO}-model-1-2"):
        (tmp_path / "run" / "states" / name).mkdir()
    _train(tmp_path / "run", resume=True)
    _assert_same(tmp_path / "run", whole)


def test_without_a_folder_there_is_nothing_to_resume() -> None:
    with pytest.raises(ValueError, match="run_dir must be given to resume a run, got None"):
        train_recommender(_split(), _NUM_ITEMS, _CONFIG, seed=3, resume=True, progress=False)


def test_what_was_killed_before_its_first_state_is_no_obstacle(whole: Path, tmp_path: Path) -> None:
    for _ in range(2):
        _kill(tmp_path / "run", 0, Fitting, "epoch")
    _train(tmp_path / "run")
    _assert_same(tmp_path / "run", whole)
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        _train(tmp_path / "run")
