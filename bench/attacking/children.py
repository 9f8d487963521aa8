"""Trials and commands in forked processes: warm from the start, ended when they hang, and their end is looked at.

The process that forks has imported everything and computed nothing, so that no pool of threads is lost in a fork.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0  # of any command and any trial; the longest takes two seconds
_POLL_S = 0.002
_DIED = 70  # exit status of a child that raised what no command lets out
_ERROR = "laser-fast: error: "
_WARNING = "laser-fast: warning: "
_BAR = re.compile(r"\d%\||[\d?](it|epoch|batch|step)/s")  # tqdm's, which a file gets as well


@dataclass
class Findings:
    """What a trial saw.

    Attributes:
        outcomes: how often things ended in which way; together they are what was tried.
        lost: how often something was lost.
        losses: each in words from which it can be done again.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    losses: list[str] = field(default_factory=list)

    def saw(self, outcome: str, times: int = 1) -> None:
        """Count a way in which something ended."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + times

    def lose(self, what: str, times: int = 1) -> None:
        """Note a loss, which is no outcome of its own."""
        self.lost += times
        self.losses.append(what)

    def add(self, other: "Findings") -> None:
        """Take in what another one saw."""
        for outcome, times in other.outcomes.items():
            self.saw(outcome, times)
        self.lost += other.lost
        self.losses += other.losses


Trial = Callable[[Findings], None]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status, or minus the number of the signal that ended it.
        out, err: what it printed.
        late: whether it was ended because it took too long.
    """

    status: int
    out: str
    err: str
    seconds: float
    late: bool = False

    def refusal(self) -> str | None:
        """The message of a command that was refused as promised: status 2 and one line, warnings beside it."""
        lines = [line for line in self.err.splitlines() if line.strip() and not line.startswith(_WARNING)]
        lines = [line for line in lines if not _BAR.search(line)]
        refused = self.status == 2 and len(lines) == 1 and lines[0].startswith(_ERROR)
        return lines[0].removeprefix(_ERROR) if refused else None

    def told(self) -> str:
        """Status and the end of what it printed, in one line."""
        if self.late:
            return f"was not over after {self.seconds:.0f} s"
        how = f"signal {signal.Signals(-self.status).name}" if self.status < 0 else f"status {self.status}"
        lines = [line for line in self.err.splitlines() if line.strip()]
        begin = next((number for number, line in enumerate(lines) if line.startswith(_ERROR)), -2)
        return f"{how}, {' / '.join(lines[begin:])[:300] or 'nothing said'}"


class Child:
    """A process that calls a function, which gives its exit status, and is listened to.

    Args:
        folder: becomes its working directory.
        held: both ends of a pipe; it waits until nobody has the writing one any more.
        leads: whether it is ended together with all that it forks.
    """

    def __init__(
        self, work: Callable[[], int], folder: Path, *, held: tuple[int, int] | None = None, leads: bool = False
    ) -> None:
        self._leads = leads
        pipes = [os.pipe(), os.pipe()]  # no files: what bounds a command's files is not to bound what it says
        self._said = [b"", b""]
        self.began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(work, folder, held, [writing for _, writing in pipes])
        for _, writing in pipes:
            os.close(writing)
        self._reading = [reading for reading, _ in pipes]
        for reading in self._reading:
            os.set_blocking(reading, False)

    def _live(
        self, work: Callable[[], int], folder: Path, held: tuple[int, int] | None, outputs: Sequence[int]
    ) -> None:
        status = _DIED
        try:
            if self._leads:
                os.setpgid(0, 0)
            for number, writing in enumerate(outputs, start=1):
                os.dup2(writing, number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.chdir(folder)
            if held is not None:
                os.close(held[1])
                os.read(held[0], 1)
            status = work()
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else _DIED
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(status)

    def ended(self, patience: float = PATIENCE_S) -> Ended:
        """Wait for it, with patience."""
        while (found := self.poll(patience)) is None:
            time.sleep(_POLL_S)
        return found

    def poll(self, patience: float = PATIENCE_S) -> Ended | None:
        """How it ended; None while it runs."""
        self._listen()
        seconds = time.monotonic() - self.began
        pid, code = os.waitpid(self.pid, os.WNOHANG)
        late = not pid and seconds > patience
        if late:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL) if self._leads else self.kill()
            _, code = os.waitpid(self.pid, 0)
        elif not pid:
            return None
        self._listen()
        for reading in self._reading:
            os.close(reading)
        said = [content.decode("utf-8", "replace") for content in self._said]
        return Ended(os.waitstatus_to_exitcode(code), *said, seconds, late)

    def _listen(self) -> None:
        for stream, reading in enumerate(self._reading):
            with suppress(BlockingIOError):
                while content := os.read(reading, 1 << 16):
                    self._said[stream] += content

    def kill(self) -> None:
        """SIGKILL, as a power user, a scheduler or the kernel out of memory sends it."""
        os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own


def laser_fast(*arguments: str | Path) -> Callable[[], int]:
    """The command line as it is, to be called in a child."""
    from laser_fast.cli import main

    return lambda: main([str(argument) for argument in arguments])


def run(arguments: Sequence[str | Path], folder: Path, patience: float = PATIENCE_S) -> Ended:
    """A command from its start to its end."""
    return Child(laser_fast(*arguments), folder).ended(patience)


def done(arguments: Sequence[str | Path], folder: Path) -> Ended:
    """`run`, for a command that must succeed.

    Raises:
        RuntimeError: it did not.
    """
    found = run(arguments, folder)
    if found.status:
        raise RuntimeError(f"done: {arguments[0]} must end with status 0, got {found.told()}")
    return found


def ask(work: Callable[[], Any], folder: Path) -> Any:
    """What a function gives, as JSON takes it, computed in a child: this process stays one that computed nothing.

    Raises:
        RuntimeError: the child failed.
    """
    file = folder / "answer.json"

    def answer() -> int:
        file.write_text(json.dumps(work()), encoding="utf-8")
        return 0

    found = Child(answer, folder).ended()
    if found.status:
        raise RuntimeError(f"ask: the child must end with status 0, got {found.told()}")
    given = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return given


def carry_out(
    trials: Iterable[Trial], folder: Path, until: float, at_once: int, patience: float = PATIENCE_S
) -> Iterator[Findings]:
    """Every trial in a process of its own, several at once; what each saw, as they end.

    A trial that dies, raises or hangs has lost: it is made to bear what it is given.

    Args:
        folder: for their findings.
        until: moment of the monotonic clock after which no trial begins.
        patience: seconds for each.
    """
    waiting, running = enumerate(trials), dict[Child, Path]()
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < at_once:
            number, trial = next(waiting, (0, None)) if time.monotonic() < until else (0, None)
            if trial is None:
                exhausted = True
                break
            file = folder / f"findings-{number}.json"
            running[Child(lambda trial=trial, file=file: _try(trial, file), folder, leads=True)] = file
        for child, file in list(running.items()):
            if (end := child.poll(patience)) is not None:
                del running[child]
                yield _found(end, file)
        time.sleep(_POLL_S)


def _try(trial: Trial, file: Path) -> int:
    findings = Findings()
    trial(findings)
    file.write_text(json.dumps(vars(findings)), encoding="utf-8")
    return 0


def _found(end: Ended, file: Path) -> Findings:
    if end.status or not file.exists():
        return Findings({"died": 1}, 1, [end.told()])
    found = Findings(**json.loads(file.read_text(encoding="utf-8")))
    file.unlink()
    return found


def one_thread() -> None:
    """Import what the children need and give every computation one thread; to be called before anything is forked."""
    import torch
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by all forks: one that is killed holding it stops the others
