"""Places that cannot be written: full, read-only, of a wrong kind, of a name too long.

Lost is: anything but one line of refusal, a result that is half there, and a command that, given again when there is
room, does not come to what an uninterrupted one writes.
"""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from attacking.attack import Scope
from attacking.children import Ended, Findings, Trial, ask, run
from attacking.kills import Command, commands, contents, differing, uninterrupted
from attacking.mounts import mount, remount
from attacking.world import RECOMMENDER

TITLE = "places"
_TIMES = 25  # of every command, for a full disk and for files that may not grow
_ROOM = 64 * 2**20
_POSSIBLE = ("a name of 250 letters", "nothing")  # some commands need nothing beside it, and nothing is here
_PAGE = 4096  # bytes: what a file takes at least
_FILES = 16  # that are there at once, about


def attack(scope: Scope) -> None:
    """Lines for full disks, read-only ones, and places of a wrong kind."""
    allowed = _mounts_are_allowed(scope)
    writing = commands(scope)[: scope.times(3)]
    scope.divide(1 + 3 * len(writing))
    for command in writing:
        name, (expected, _) = command.name, uninterrupted(scope, command)
        if allowed:
            scope.try_all(name, f"`{name}` on a full disk", _trials(scope, command, expected, _full))
            closed = [lambda findings, command=command: _read_only(findings, scope, command)]
            scope.try_all(name, f"`{name}` on a read-only disk", closed)
        else:
            scope.not_run(name, f"`{name}` on a full disk", "no process may mount here")
        scope.try_all(name, f"`{name}` with a bound on files", _trials(scope, command, expected, _bounded))
    odd = list(_odd(scope))
    what = "outputs and inputs of a wrong kind or with an impossible name"
    scope.try_all("places", what, odd[: scope.times(len(odd))])


Fault = Callable[[Path, int, Callable[[], Ended]], Ended]


def _trials(scope: Scope, command: Command, expected: dict[str, object], fault: Fault) -> Iterator[Trial]:
    size = sum(len(content) for content in expected.values() if isinstance(content, bytes))
    for number in range(scope.times(_TIMES)):
        drawn = scope.random(TITLE, command.name, fault.__name__, number)
        room = drawn.randint(_PAGE, 2 * size + _FILES * _PAGE)
        folder = scope.place(command.name, fault.__name__, number)
        yield lambda findings, room=room, folder=folder: _try(findings, command, expected, fault, room, folder)


def _try(
    findings: Findings, command: Command, expected: dict[str, object], fault: Fault, room: int, folder: Path
) -> None:
    told = f"{command.name}, {fault.__name__.strip('_')} at {room} bytes"
    end = fault(folder, room, lambda: run(command.words, folder))
    if end.status == 0:
        findings.saw("had room")
    elif end.refusal() is None:
        findings.saw("failed")
        findings.lose(f"{told}: {end.told()}")
    else:
        findings.saw("refused")
    try:
        command.check(folder / "out")
    except Exception as error:
        findings.lose(f"{told}: a reader meets {type(error).__name__}: {str(error)[:200]}")
    if beside := sorted(path.name for path in folder.iterdir() if path.name != "out"):
        findings.lose(f"{told}: {', '.join(beside)} lie beside it")
    if end.status and (end := run(command.again(folder), folder)).status:
        findings.lose(f"{told}: given again with more room it ends with {end.told()}")
        return
    if names := differing(contents(folder / "out"), expected):
        findings.lose(f"{told}: given again, {', '.join(names)} differ from those of an uninterrupted one")


def _full(folder: Path, room: int, command: Callable[[], Ended]) -> Ended:
    """On a file system of so many bytes, which is larger afterwards."""
    mount(folder, room)
    try:
        return command()
    finally:
        remount(folder, _ROOM)


def _bounded(folder: Path, room: int, command: Callable[[], Ended]) -> Ended:
    """With files of at most a quarter of so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room // 4, before[1]))
    try:
        return command()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _read_only(findings: Findings, scope: Scope, command: Command) -> None:
    folder = scope.place(command.name, "read-only")
    mount(folder, _ROOM)
    remount(folder, _ROOM, writable=False)
    _expect_refusal(findings, command.name, run(command.words, folder))


def _mounts_are_allowed(scope: Scope) -> bool:
    place = scope.place("mounts")

    def allowed() -> bool:
        with suppress(OSError):
            mount(place, _ROOM)
            return True
        return False

    return bool(ask(allowed, scope.folder))


def _expect_refusal(findings: Findings, told: str, end: Ended) -> None:
    refused = end.refusal() is not None
    findings.saw("refused" if refused else "failed" if end.status else "accepted")
    if not refused:
        findings.lose(f"{told}: {end.told()}")


def _odd(scope: Scope) -> Iterator[Trial]:
    """Every one of them is to be refused, or where it may be meant so, done."""
    world, odd = scope.world, _odd_places(scope)
    (log, items), data, configuration, trained = world.sources, world.data, world.configuration, world.run()
    for name, out in odd.items():
        may = name in _POSSIBLE
        yield _refused(scope, f"prepare into {name}", ["prepare", out, *_sources(log, items)], may)
        yield _refused(scope, f"recommender train into {name}", ["recommender", "train", data, out, *RECOMMENDER], may)
        yield _refused(scope, f"train into {name}", ["train", configuration, "--set", f"output={out}"], may)
        if name not in ("nothing", "a folder of somebody", "a link to it"):
            yield _refused(scope, f"evaluate into {name}", ["evaluate", trained, "--output", out], may)
    kept = ("a folder of somebody", "nothing", "a folder in a file", "a name of 300 letters")
    sources = {name: odd[name] for name in kept} | {"no file": scope.folder / "none", "an empty device": "/dev/null"}
    for name, source in sources.items():
        yield _refused(scope, f"prepare from {name}", ["prepare", "out", *_sources(source, items)])
        yield _refused(scope, f"items from {name}", ["prepare", "out", *_sources(log, source)])
        yield _refused(scope, f"train by {name}", ["train", source])
        yield _refused(scope, f"recommender train on {name}", ["recommender", "train", source, "out"])
        yield _refused(scope, f"train on {name}", ["train", configuration, "--set", f"data={source}"])
        yield _refused(scope, f"train with {name}", ["train", configuration, "--set", f"recommender={source}"])
        yield _refused(scope, f"recommend by {name}", ["recommend", source, "--history", "i1"])


def _sources(log: str | Path, items: str | Path) -> list[str | Path]:
    return ["--interactions", log, "--items", items]


def _odd_places(scope: Scope) -> dict[str, str | Path]:
    """Where nothing can or may be written. No device of the system: who is root would lose it."""
    file, full, link, pipe = (scope.folder / name for name in ("a-file", "a-folder", "a-link", "a-pipe"))
    file.write_text("x", encoding="utf-8")
    full.mkdir()
    (full / "own.txt").write_text("x", encoding="utf-8")
    link.symlink_to(full)
    os.mkfifo(pipe)
    return {
        "a name of 300 letters": "n" * 300,
        "a name of 250 letters": "n" * 250,  # it fits, what is written beside it does not
        "a path of 5000 letters": "/".join(["n" * 99] * 50),
        "a folder in a file": file / "out",
        "a folder of somebody": full,
        "a link to it": link,
        "a pipe": pipe,
        "a place in /proc": "/proc/out",
        "nothing": "",
    }


def _refused(scope: Scope, told: str, words: list[str | Path], may_succeed: bool = False) -> Trial:
    def trial(findings: Findings) -> None:
        folder = scope.place("odd", told.replace("/", "-").replace(" ", "-"))
        end = run(words, folder)
        if end.status == 0 and may_succeed:
            findings.saw("done")
        else:
            _expect_refusal(findings, told, end)
            if left := sorted(path.name[:40] for path in folder.iterdir()):
                findings.lose(f"{told}: left {', '.join(left)}")
        if not (pipe := scope.folder / "a-pipe").is_fifo():
            findings.lose(f"{told}: the pipe is none any more")
            pipe.unlink()
            os.mkfifo(pipe)
        shutil.rmtree(folder)

    return trial
