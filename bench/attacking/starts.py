"""Many processes that begin one output at once, each in its own way: one of them writes it, the others are refused.

Lost is: no winner or several, a process that is not refused in one line with the folder's name, and a folder that is
not bit by bit what the winner writes alone.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from attacking.attack import Scope
from attacking.children import Child, Findings, done, laser_fast
from attacking.kills import contents, differing
from attacking.world import RECOMMENDER

TITLE = "starts"
_STARTS = 60
_READY_S = 0.5  # until the last of them waits
_PATIENCE_S = 240.0
_NAME = "taken"  # no message says this word of its own accord

Words = Callable[[int], list[str | Path]]


def attack(scope: Scope) -> None:
    """A line for every command that writes a folder."""
    world = scope.world
    log, items = world.sources
    prepare = ["prepare", _NAME, "--interactions", log, "--items", items, "--tie-rule"]
    recommender = ["recommender", "train", world.data, _NAME, *RECOMMENDER, "--seed"]
    commands: dict[str, Words] = {
        "prepare": lambda turn: [*prepare, f"hash:{turn}"],
        "recommender train": lambda turn: [*recommender, str(turn)],
        "train": lambda turn: world.train_words(_NAME, turn),
    }
    scope.divide(len(commands))
    for name, words in list(commands.items())[: scope.times(len(commands))]:
        words(0)  # makes what all of them read
        starts, folder = max(2, scope.times(_STARTS)), scope.place(TITLE, name)
        what = f"`{name}` begun {starts} times at once with one output"
        trial = [lambda findings, words=words, starts=starts, folder=folder: _try(findings, words, starts, folder)]
        scope.try_all(name, what, trial, patience=_PATIENCE_S)


def _try(findings: Findings, words: Words, starts: int, folder: Path) -> None:
    pipe = os.pipe()
    children = [Child(laser_fast(*words(turn)), folder, held=pipe) for turn in range(starts)]
    time.sleep(_READY_S)
    os.close(pipe[1])  # all of them read the end of it now
    ends = [child.ended(_PATIENCE_S) for child in children]
    winners = [turn for turn, end in enumerate(ends) if end.status == 0]
    findings.saw("won", len(winners))
    for turn, end in enumerate(ends):
        if end.status == 0:
            continue
        refused = _NAME in (end.refusal() or "")
        findings.saw("refused" if refused else "failed")
        if not refused:
            findings.lose(f"process {turn}: {end.told()}")
    if len(winners) != 1:
        findings.lose(f"{len(winners)} of {starts} wrote it: {winners}", max(1, len(winners) - 1))
    alone = folder / "alone"
    for turn in winners[:1]:
        alone.mkdir()
        done(words(turn), alone)
        if names := differing(contents(folder / _NAME), contents(alone / _NAME)):
            findings.lose(f"{', '.join(names)} differ from those of the winner alone")
    if left := sorted(path.name for path in folder.iterdir() if path.name not in (_NAME, "alone")):
        findings.lose(f"{', '.join(left)} lie beside the folder")
    shutil.rmtree(folder)
