"""One process at a time writes an output: it claims the output before it looks into it.

The lock is on a file beside the output, `.NAME.laser-fast.lock`: the output itself may not be there yet, and
`replace_directory` puts another folder under its name. The system frees a lock however its process ends, so the lock
file of a dead process is no obstacle; the next claim takes it over and removes it.
"""

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from laser_fast.files.disk import make_directory, open_no_link

_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_claimed: ContextVar[frozenset[tuple[int, Path]]] = ContextVar("claimed", default=frozenset())


@contextmanager
def claim(output: str | Path) -> Iterator[None]:
    """Let no other process or thread write `output` meanwhile; it need not exist.

    A claim holds all that is in a folder and may be repeated; a process forked meanwhile does not have it. A link is
    not followed: two names of one folder are two outputs, unless the caller resolves them.

    Raises:
        ValueError: another process or thread has claimed it, or a folder that it lies in.
        FileExistsError: a link lies where the lock file belongs.
    """
    absolute = Path(os.path.abspath(output))
    place = absolute.parent.resolve() / absolute.name
    process, held = os.getpid(), _claimed.get()
    if any((process, folder) in held for folder in (place, *place.parents)):
        yield
        return
    descriptor = _lock(place)
    token = _claimed.set(held | {(process, place)})
    try:
        _refuse_claimed_around(place)
        yield
    finally:
        _claimed.reset(token)
        if os.getpid() == process:  # else the lock is its parent's, which goes on
            _release(place, descriptor)


def lock_file(output: Path) -> Path:
    """The lock file of an output."""
    return output.parent / f".{output.name}.laser-fast.lock"


def _lock(place: Path) -> int:
    """A descriptor that holds the lock of an output; without one, after a warning, where the file system has none."""
    while True:
        descriptor = _open(place)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _taken(place) from None
        except OSError as error:  # some network file systems lock nothing
            rule = f"the file system should lock {str(place)!r} against a second process"
            warnings.warn(f"claim: {rule}, got {error}; start none meanwhile", stacklevel=5)
            return descriptor
        if any(_is_open(descriptor, path) for path in (lock_file(place), place)):
            return descriptor
        os.close(descriptor)  # whoever held it removed the file after it was opened here


def _refuse_claimed_around(place: Path) -> None:
    """Refuse an output in a folder that another process has claimed and may replace."""
    for folder in place.parents:
        with suppress(OSError):  # there is none, or it is not ours to look at
            descriptor = os.open(lock_file(folder), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _taken(folder) from None
            finally:
                os.close(descriptor)


def _taken(place: Path) -> ValueError:
    return ValueError(
        f"claim: an output must be written by one process at a time, got {str(place)!r}, at which another process is "
        "at work; wait for it, stop it or choose another output"
    )


def _open(place: Path) -> int:
    """The lock file of an output; the output itself where nobody may write beside it, and so nobody replaces it."""
    make_directory(place.parent)
    try:
        return open_no_link(lock_file(place), os.O_RDWR)
    except OSError as error:
        if error.errno not in _NOT_ALLOWED or not place.exists():
            raise
    return os.open(place, os.O_RDONLY)


def _release(place: Path, descriptor: int) -> None:
    if _is_open(descriptor, lock_file(place)):
        with suppress(OSError):  # the folder around it may have become read-only
            lock_file(place).unlink()  # while it is locked, so that nobody locks a file that is about to go
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone leaves it to a forked child that has the descriptor too
    os.close(descriptor)


def _is_open(descriptor: int, path: Path) -> bool:
    """Whether this path still is what the descriptor was opened on."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
