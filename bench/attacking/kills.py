"""Commands killed at random moments, then given again: what they leave is that of one that nobody stopped.

A trial gives a command, kills it up to three times - the second while it goes on from the first -, and gives it once
more to its end. Lost is: a file that differs from that of an uninterrupted command or lies about beside it, a command
that fails, and after any kill a folder that a reader takes for whole and is not.
"""

import json
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacking.attack import Scope
from attacking.children import Child, Ended, Findings, Trial, done, laser_fast, run
from attacking.world import RECOMMENDER, World

TITLE = "kills"
_KILLS = 75  # of every command; some strike when all is over, and are none
_MOST = 3  # of one trial
_DATES = ("environment.json", "finished.json")
_TIMES = ("time_s", "text_tokens_per_s")


@dataclass(frozen=True)
class Command:
    """A command that writes the folder `out`.

    Attributes:
        words: as it is given.
        check: looks at what a kill left, and raises what no reader may meet.
        before: puts the trial's folder into the state it begins with.
        resumes: whether it goes on where it was killed, with `--resume`; else it is given as before.
    """

    name: str
    words: list[str | Path]
    check: Callable[[Path], None]
    before: Callable[[Path, random.Random], None] = lambda folder, drawn: None
    resumes: bool = True

    def again(self, folder: Path) -> list[str | Path]:
        """After a kill. Where nothing was begun, which the configuration tells, there is nothing to go on with."""
        begun = self.resumes and (folder / "out" / "config.yaml").exists()
        return [*self.words, "--resume"] if begun else self.words


def attack(scope: Scope) -> None:
    """A line for each of the three commands that write folders."""
    scope.divide(len(writing := commands(scope)))
    for command in writing:
        what = f"`{command.name}` killed by SIGKILL at random moments, then given again"
        scope.try_all(command.name, what, _trials(scope, command, *uninterrupted(scope, command)))


def commands(scope: Scope) -> list[Command]:
    """Those that write folders."""
    return [_prepare(scope), _recommender(scope.world), _train(scope.world)]


def uninterrupted(scope: Scope, command: Command) -> tuple[dict[str, Any], float]:
    """What it writes, and how long it takes; for all attacks of a run once."""
    known = scope.world.uninterrupted
    if command.name not in known:
        durations = []
        for number in range(scope.times(3)):
            folder = scope.place(command.name, "whole", number)
            durations.append(done(command.words, folder).seconds)
        known[command.name] = contents(folder / "out"), statistics.median(durations)
    return known[command.name]


def _trials(scope: Scope, command: Command, expected: dict[str, Any], duration: float) -> Iterator[Trial]:
    kills, number = scope.times(_KILLS), 0
    while kills:
        number += 1
        drawn = scope.random(TITLE, command.name, number)
        some = min(kills, drawn.randint(1, _MOST))
        kills -= some
        folder = scope.place(command.name, number)
        yield Killing(command, folder, drawn, kills=some, expected=expected, duration=duration)


@dataclass(frozen=True)
class Killing:
    """A trial in a folder of its own: at most `kills` of a command that writes `expected` in `duration` seconds."""

    command: Command
    folder: Path
    drawn: random.Random
    kills: int
    expected: dict[str, Any]
    duration: float

    def __call__(self, findings: Findings) -> None:
        """Kill, go on, look."""
        command, folder, killed = self.command, self.folder, list[str]()
        command.before(folder, self.drawn)
        words = command.words
        for _ in range(self.kills):
            moment = self.drawn.uniform(0, self.duration)
            end = _killed(words, folder, moment)
            if end.status != -signal.SIGKILL:
                break  # it was over before
            killed.append(f"{moment:.3f} s")
            findings.saw("killed")
            try:
                command.check(folder / "out")
            except Exception as error:
                findings.lose(f"{self._told(killed)}: a reader meets {type(error).__name__}: {str(error)[:200]}")
            words = command.again(folder)
        else:
            end = run(words, folder)
        if end.status:
            findings.lose(f"{self._told(killed)}: given again it ends with {end.told()}")
            return
        if names := differing(contents(folder / "out"), self.expected):
            findings.lose(f"{self._told(killed)}: {', '.join(names)} differ from those of an uninterrupted one")
        if beside := sorted(path.name for path in folder.iterdir() if path.name != "out"):
            findings.lose(f"{self._told(killed)}: {', '.join(beside)} lie beside it")
        shutil.rmtree(folder)

    def _told(self, killed: list[str]) -> str:
        return f"{self.folder.name}, killed after {', '.join(killed)}"


def _killed(arguments: list[str | Path], folder: Path, moment: float) -> Ended:
    child = Child(laser_fast(*arguments), folder)
    time.sleep(max(0.0, child.began + moment - time.monotonic()))
    child.kill()
    return child.ended()


def differing(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The files that are missing, too many, or other ones."""
    return [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


def contents(folder: Path) -> dict[str, Any]:
    """Every file by its name, without what tells when and how fast it was made."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = str(path.relative_to(folder))
        if name in _DATES:
            found[name] = ""
        elif name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = [json.dumps({key: line[key] for key in line if key not in _TIMES}) for line in lines]
        else:
            found[name] = path.read_bytes()
    return found


def _prepare(scope: Scope) -> Command:
    """Half of the trials begin with a data set that was made in another way."""
    from laser_fast.data import SequenceDataset

    log, items = scope.world.sources
    sources: list[str | Path] = ["prepare", "out", "--interactions", log, "--items", items, "--overwrite", "--tie-rule"]
    words, place = [*sources, "hash:1"], scope.place("prepare", "other")
    done([*sources, "hash:2"], place)

    def check(out: Path) -> None:
        if out.exists():
            SequenceDataset.load(out)

    def before(folder: Path, drawn: random.Random) -> None:
        if drawn.random() < 0.5:
            shutil.copytree(place / "out", folder / "out")

    return Command("prepare", words, check, before, resumes=False)


def _recommender(world: World) -> Command:
    def check(out: Path) -> None:
        from laser_fast.recommenders.recommender_files import load_recommender

        with suppress(FileNotFoundError):
            load_recommender(out)

    return Command("recommender train", ["recommender", "train", world.data, "out", *RECOMMENDER], check)


def _train(world: World) -> Command:
    def check(out: Path) -> None:
        from laser_fast import LaserModel

        if (out / "checkpoint").exists():
            with suppress(FileNotFoundError):
                LaserModel.from_pretrained(out)

    return Command("train", ["train", world.configuration, "--set", "output=out"], check)
