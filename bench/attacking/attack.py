"""What an attack is: a name, what it tries, and trials whose findings are counted."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reporting.reasons import without_paths

from attacking.children import PATIENCE_S, Findings, Trial, carry_out
from attacking.world import World

_KEPT = 20  # losses that a line spells out

Line = dict[str, Any]


@dataclass(kw_only=True)
class Scope:
    """What one attack is given.

    Attributes:
        world: models and data of the trials.
        folder: its own, for anything.
        seed: all that is drawn follows from it.
        until: moment of the monotonic clock after which no trial begins.
        at_once: how many processes run.
        rehearse: whether everything is tried only once.
        take: is given every line as it is finished.
    """

    world: World
    folder: Path
    seed: int
    until: float
    at_once: int
    rehearse: bool
    take: Callable[[Line], None]
    lines: list[Line] = field(default_factory=list)
    _to_come: int = 1

    def random(self, *words: object) -> random.Random:
        """A generator of its own for everything that is named."""
        return random.Random("/".join(map(str, (self.seed, *words))))

    def times(self, count: int) -> int:
        """How often something is tried."""
        return 1 if self.rehearse else count

    def place(self, *words: object) -> Path:
        """A new folder."""
        place = self.folder / "-".join(map(str, words))
        place.mkdir(parents=True)
        return place

    def divide(self, lines: int) -> None:
        """Say how many lines are to come, which share the time that is left."""
        self._to_come = lines

    def try_all(self, name: str, what: str, trials: Iterable[Trial], *, patience: float = PATIENCE_S) -> None:
        """Carry out the trials of one line of the table, each with so many seconds of patience."""
        begin, all_of_them = time.monotonic(), Findings()
        until = begin + (self.until - begin) / max(1, self._to_come)
        for found in carry_out(trials, self.folder, until, self.at_once, patience):
            all_of_them.add(found)
        if not all_of_them.outcomes and not all_of_them.lost:
            self.not_run(name, what, "no time was left")
            return
        self.report(name, what, all_of_them, time.monotonic() - begin)

    def not_run(self, name: str, what: str, reason: str) -> None:
        """A line that says why nothing was tried: that is no pass."""
        self.report(name, what, Findings(), 0.0, reason)

    def report(self, name: str, what: str, found: Findings, seconds: float, not_run: str | None = None) -> None:
        """A line of what was found."""
        line = {
            "name": name,
            "what": what,
            "tried": sum(found.outcomes.values()),
            "outcomes": dict(sorted(found.outcomes.items())),
            "lost": found.lost,
            "losses": [without_paths(loss) for loss in found.losses[:_KEPT]],
            "seconds": round(seconds, 1),
            "not_run": not_run,
        }
        self._to_come -= 1
        self.lines.append(line)
        self.take(line)
