"""An output is written by one process at a time; who is late is told so, and a dead process is in nobody's way."""

import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from laser_fast.data import PrepareRequest, prepare
from laser_fast.data.preparation.presplit import prepare_presplit
from laser_fast.files.atomic import replace_directory
from laser_fast.files.locks import claim, lock_file

Elsewhere = Callable[[Path], AbstractContextManager[None]]
StartAtOnce = Callable[[int, Callable[[Callable[[], None]], object]], list[str]]
_REFUSED = "must be written by one process at a time, got '.*/out', at which another process is at work"


def test_the_lock_is_gone_afterwards_and_may_be_taken_again(tmp_path: Path, claimed_elsewhere: Elsewhere) -> None:
    output = tmp_path / "deep" / "out"
    for _ in range(2):
        with claim(output):
            assert lock_file(output).exists()
        assert not list(output.parent.iterdir())
    with claimed_elsewhere(output), pytest.raises(ValueError, match=_REFUSED), claim(output):
        pytest.fail("two have it")
    with claim(output):
        pass


def test_a_claim_holds_what_is_inside_and_the_same_again(tmp_path: Path) -> None:
    with claim(tmp_path / "out"), claim(tmp_path / "out"), claim(tmp_path / "out" / "checkpoint"):
        assert [path.name for path in tmp_path.iterdir()] == [lock_file(tmp_path / "out").name]
    assert not list(tmp_path.iterdir())


def _is_claimed(output: Path) -> bool:
    try:
        with claim(output):
            return False
    except ValueError:
        return True


def _of_thread(ask: Callable[[], bool]) -> bool:
    """What another thread answers."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(ask()))
    thread.start()
    thread.join()
    return answers == [True]


def _of_child(ask: Callable[[], bool]) -> bool:
    """What a forked process answers."""
    child = os.fork()
    if child == 0:
        answer = False
        try:
            answer = ask()
        finally:
            os._exit(0 if answer else 1)
    return os.waitpid(child, 0)[1] == 0


def test_another_thread_and_a_forked_process_are_others(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with claim(output):
        assert _of_thread(lambda: _is_claimed(output))
        assert _of_child(lambda: _is_claimed(output) and _is_claimed(output / "checkpoint"))


def test_what_a_dead_process_left_is_no_obstacle(tmp_path: Path) -> None:
    def die() -> bool:
        with claim(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    assert not _of_child(die)
    assert lock_file(tmp_path / "out").exists()
    assert not _is_claimed(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_child_that_lives_on_holds_nothing(tmp_path: Path) -> None:
    with claim(tmp_path / "out"):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        assert not _is_claimed(tmp_path / "out")
        assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_forked_process_frees_nothing(tmp_path: Path) -> None:
    def leave() -> bool:
        parent.close()
        return True

    with ExitStack() as parent:
        parent.enter_context(claim(tmp_path / "out"))
        assert _of_child(leave)
        assert lock_file(tmp_path / "out").exists() and _of_child(lambda: _is_claimed(tmp_path / "out"))
    assert not _is_claimed(tmp_path / "out")


def test_what_lies_in_a_claimed_folder_is_claimed(tmp_path: Path, claimed_elsewhere: Elsewhere) -> None:
    with claimed_elsewhere(tmp_path / "out"):
        with pytest.raises(ValueError, match=_REFUSED), claim(tmp_path / "out" / "deep" / "run"):
            pytest.fail("it may be replaced together with the folder")
        with claim(tmp_path / "beside"):
            pass
        assert not list((tmp_path / "out" / "deep").iterdir())
    with claim(tmp_path / "out" / "deep" / "run"):
        pass


def test_a_link_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    lock_file(tmp_path / "out").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match="must be a file, got the link"), claim(tmp_path / "out"):
        pytest.fail("claimed")
    assert not (tmp_path / "precious").exists()


def test_where_nobody_may_write_beside_it_the_folder_itself_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:  # the tests may run as root, whom no mode keeps out
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    (tmp_path / "out").mkdir()
    with claim(tmp_path / "out"):
        assert _of_thread(lambda: _is_claimed(tmp_path / "out"))
    assert not _is_claimed(tmp_path / "out")
    with pytest.raises(PermissionError), claim(tmp_path / "absent"):
        pytest.fail("claimed")


def test_a_file_system_that_locks_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError("Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="should lock '.*/out' .*, got Bad file"), claim(tmp_path / "out"):
        assert lock_file(tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


def test_of_those_that_claim_at_once_one_gets_it(start_at_once: StartAtOnce, tmp_path: Path) -> None:
    def start(hold: Callable[[], None]) -> None:
        with claim(tmp_path / "out"):
            hold()

    refused = start_at_once(24, start)
    assert len(refused) == 23 and all(re.search(f"^ValueError: claim: an output {_REFUSED}", text) for text in refused)
    assert not list(tmp_path.iterdir())


def test_everybody_claims_before_looking(claimed_elsewhere: Elsewhere, tmp_path: Path) -> None:
    """The sources do not exist: who looked at them first would say so."""
    out = tmp_path / "out"
    with claimed_elsewhere(out):
        before = list(tmp_path.iterdir())
        with pytest.raises(ValueError, match=_REFUSED):
            prepare(PrepareRequest(out, interactions=tmp_path / "absent.csv"))
        with pytest.raises(ValueError, match=_REFUSED):
            prepare_presplit(tmp_path / "absent", out)
        with pytest.raises(ValueError, match=_REFUSED), replace_directory(out):
            pytest.fail("opened")
        assert list(tmp_path.iterdir()) == before
