"""The scheduler: items one after the other, each in a process of its own, whatever happens in any of them."""

import argparse
import importlib
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from reporting.reasons import without_paths

from gpu import machine
from gpu.lines import MACHINE, Lines, line_of
from gpu.process import Ended, carry_out
from gpu.table import tables
from gpu.work import Order, Work

_MINUTES = 14.0
_REHEARSED_LONGER = 4.0  # limits are those of a GPU machine; a busy CPU takes longer for less
_WORTH_S = 1.0  # with less, a process measures nothing


@dataclass(frozen=True)
class Item:
    """A part of the run.

    Attributes:
        title: heading of its table.
        names: of its lines, the most valuable first; the argument says whether of a rehearsal.
        run: measures them, in a process of its own, which is ended after `seconds`.
        least_s: with less than that left it does not begin.
        line_s: seconds that one line may take: one that hangs costs no other.
    """

    number: int
    title: str
    names: Callable[[bool], list[str]]
    run: Callable[[Work], None]
    seconds: float
    least_s: float
    line_s: float = 30.0


@dataclass
class Job:
    """A call of the run: what it was told, and where its lines go."""

    items: str
    out: Path
    lines: Lines
    environment: dict[str, str]
    rehearse: bool
    end: float

    @property
    def slack(self) -> float:
        """What limits are multiplied with."""
        return _REHEARSED_LONGER if self.rehearse else 1.0

    def write(self, item: Item, name: str, status: str, **facts: Any) -> None:
        """A line that the scheduler itself has to say."""
        facts |= {"rehearsal": True} if self.rehearse else {}
        self.lines.append(line_of(item.number, name, without_paths(status), **facts))

    def missing(self, item: Item) -> list[str]:
        """Names of the item without a final line."""
        return self.lines.missing(item.number, item.names(self.rehearse), rehearse=self.rehearse)


def main(words: Sequence[str] | None = None, items: str = "gpu.items") -> int:
    """Run or show the `ITEMS` of a module; 0, or 2 where OUT is in use by another call."""
    known: list[Item] = importlib.import_module(items).ITEMS
    arguments = _arguments(words, known)
    results = arguments.out / "results.jsonl"
    if arguments.table:
        print(tables(results.read_bytes(), {item.number: item.title for item in known}))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = monotonic() + 60 * arguments.minutes * (_REHEARSED_LONGER if arguments.rehearse else 1.0)
    try:
        lines = Lines(results)
    except BlockingIOError:
        print(f"gpu_run: no other call may be writing {results.name}, got one that is", file=sys.stderr)
        return 2
    sys.path[:0] = map(str, arguments.site)  # versions of what lies there are part of the record
    environment, package = machine.importable(arguments.site, rehearse=arguments.rehearse)
    given = sys.argv[1:] if words is None else [str(word) for word in words]
    facts = machine.facts(without_paths(shlex.join(["python3", "bench/gpu_run.py", *given])), arguments.commit)
    facts |= {"package": without_paths(package), **({"rehearsal": True} if arguments.rehearse else {})}
    lines.append(line_of(0, MACHINE, "ok", **facts))
    job = Job(items, arguments.out, lines, environment, arguments.rehearse, end)
    for item in known:
        if item.number in arguments.items:
            _run_item(job, item)
    return 0


def _arguments(words: Sequence[str] | None, known: Sequence[Item]) -> argparse.Namespace:
    listed = "; ".join(f"{item.number} {item.title}" for item in known)
    parser = argparse.ArgumentParser(
        prog="gpu_run.py",
        description="Measure everything on a GPU, a line at a time; the same command goes on where a call was cut.",
        epilog=f"Items: {listed}.",
    )
    numbers = [item.number for item in known]
    parser.add_argument("out", type=Path, help="folder for results.jsonl and what the items print")
    parser.add_argument("--items", type=_numbers, default=numbers, help="for example 1-7 or 3,9; all of them otherwise")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help=f"for everything ({_MINUTES:g})")
    site = {"type": Path, "action": "append", "default": []}
    parser.add_argument("--site", **site, help="folder with packages, as for PYTHONPATH")
    parser.add_argument("--commit", help="of this code, where there is no .git")
    parser.add_argument("--rehearse", action="store_true", help="every item in small on the CPU; no figure is kept")
    parser.add_argument("--table", action="store_true", help="print what OUT holds as Markdown, and measure nothing")
    return parser.parse_args(words)


def _numbers(text: str) -> list[int]:
    """ "1-3,9" as [1, 2, 3, 9]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _run_item(job: Job, item: Item) -> None:
    """Start the item's process until no line is missing or the time is over; then say so of what is missing."""
    start = monotonic()
    left_s = job.end - start
    if not job.missing(item):
        return
    if left_s < item.least_s:
        for name in job.missing(item):
            job.write(item, name, f"skipped: {max(0, left_s):.0f} s left", again=True)
        return
    end = start + min(item.seconds * job.slack, left_s)
    tried: set[str] = set()  # lines that took too long: the next call tries them again, this one goes on
    why, again = "cut: the time of the item was over", True
    while (names := [name for name in job.missing(item) if name not in tried]) and end - monotonic() > _WORTH_S:
        try:
            _carry_out(job, item, names, end - monotonic())
            if set(names) <= set(job.missing(item)):
                why, again = "failed: the item ended without this line", False
                break
        except Ended as ended:
            why, again = f"{'cut' if ended.cut else 'failed'}: {ended}", ended.cut
            if ended.name is None:
                break
            job.write(item, ended.name, why, again=again)
            tried.add(ended.name)
            why, again = "cut: the time of the item was over", True
    for name in job.missing(item):
        if name not in tried:
            job.write(item, name, why, again=again)
    print(f"gpu_run: item {item.number}, {item.title}: {monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _carry_out(job: Job, item: Item, names: list[str], seconds: float) -> None:
    folder = job.out / f"item-{item.number}"
    folder.mkdir(exist_ok=True)
    order = Order(item.number, names, seconds, job.rehearse, str(folder), job.lines.known())
    try:
        log = job.out / f"item-{item.number}.txt"
        carry_out(job.items, order, item.line_s * job.slack, log, job.environment, job.lines.append)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
