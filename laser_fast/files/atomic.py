"""Files and folders that are whole or absent: written beside the target under another name, then renamed.

What lies beside a target `NAME` for a while has a drawn name, so that nobody's own files are in the way:
`.NAME.0123456789ab.partial` while it is written and `.NAME.0123456789ab.old` while it is replaced.

Files and folders are synced before the rename, and the folder around them after it. A link at the target is replaced,
never followed. What is written has the modes that the umask gives to any new file.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from laser_fast.files.disk import make_directory, sync
from laser_fast.files.locks import claim

_DRAWN = r"[0-9a-f]{12}"


def replace_file(path: Path, content: bytes) -> None:
    """Write beside and rename, so that the file is never half-written, not even by two processes at once.

    What a process killed in here left of this file is removed. Raises FileExistsError for a device or pipe.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileExistsError(f"replace_file: the target must be a file, got the device or pipe {str(path)!r}")
    _remove_partial(path)
    beside, descriptor = _fresh(path, folder=False)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(descriptor)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync(path.parent)


def replace_json(path: Path, values: Mapping[str, Any]) -> None:
    """`replace_file` with indented JSON."""
    replace_file(path, _indented(values))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Indented JSON into a folder that `replace_directory` gave and will sync."""
    path.write_bytes(_indented(values))


def _indented(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def remove(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link alone, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_others(function: str, folder: Path, names: Sequence[str]) -> None:
    """Refuse to replace a folder that holds files of others, or a file.

    Args:
        function: the first word of the message.
        names: files that belong into it; a folder that is not empty must have the first of them.

    Raises:
        FileExistsError: a file is at its place, or it holds something else.
    """
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(found - set(names) if names[0] in found else found)
    if others or (folder.exists() and not folder.is_dir()):
        got = ", ".join(map(repr, others[:3])) or "a file"
        rule = "the folder must be new, empty or hold what this function saves alone"
        raise FileExistsError(f"{function}: {rule}, got {got} at {str(folder)!r}; choose another")


@contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Give a new empty folder beside `directory`; it replaces `directory` when the block ends without an error.

    A folder cannot be swapped in one step, so for a moment the old one has a drawn name; if the process dies right
    then, `whole_directory` finds it there. The folder is claimed meanwhile (`claim`).
    """
    with claim(directory), scratch_directory(directory) as fresh:
        yield fresh
        _settle(fresh)
        if directory.is_symlink():
            directory.unlink()
        elif directory.exists():
            _remove_replaced(directory)  # so that there is never more than one
            directory.rename(directory.with_name(f".{directory.name}.{secrets.token_hex(6)}.old"))
        fresh.rename(directory)
        sync(directory.parent)
        _remove_replaced(directory)


@contextmanager
def scratch_directory(directory: Path) -> Iterator[Path]:
    """Give a new empty folder beside `directory`, removed at the end; `remove_leftovers` removes it after a kill."""
    make_directory(directory.parent)
    fresh, lock = _fresh(directory, folder=True)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(lock)


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside this file or folder; what others still write is locked and stays.

    Where one died between the two renames of `replace_directory`, the old folder gets its name back.
    """
    _remove_partial(target)
    for old in _beside(target, "old"):
        if not target.exists():
            old.rename(target)
    _remove_replaced(target)


def is_leftover(path: Path) -> bool:
    """Whether this was being written; what was being replaced is none, as it may be all there is."""
    return re.fullmatch(rf"\..+\.{_DRAWN}\.partial", path.name) is not None


def whole_directory(directory: Path) -> Path:
    """`directory`, or the old one if a process died between the renames; raises FileNotFoundError without either."""
    if directory.is_dir():
        return directory
    for old in _beside(directory, "old"):
        return old
    raise FileNotFoundError(f"whole_directory: the folder must exist, got no such folder: {str(directory)!r}")


def _fresh(target: Path, *, folder: bool) -> tuple[Path, int]:
    """A new file or folder beside the target and a descriptor of it, locked for as long as this process lives."""
    while True:
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
        fresh.mkdir() if folder else fresh.touch(exist_ok=False)
        descriptor = _locked(fresh)
        if descriptor is None:
            continue  # a removal of leftovers by another process came in between
        if fresh.exists():
            return fresh, descriptor
        os.close(descriptor)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder; None if another process has it or the path is gone."""
    try:
        descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks
    return descriptor


def _remove_partial(target: Path) -> None:
    """Remove what dead processes were writing."""
    for path in _beside(target, "partial"):
        with suppress(PermissionError):  # another user's
            if (lock := _locked(path)) is not None:
                remove(path)
                os.close(lock)


def _remove_replaced(directory: Path) -> None:
    for old in _beside(directory, "old"):
        remove(old)


def _beside(target: Path, ending: str) -> list[Path]:
    """What lies beside the target under a drawn name with this ending; links are nobody's."""
    if not target.parent.is_dir():
        return []
    pattern = re.compile(re.escape(f".{target.name}.") + rf"{_DRAWN}\.{ending}")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink()]


def _settle(folder: Path) -> None:
    """Sync all that is in a new folder, its files with the modes of new files: safetensors makes its own private."""
    mode = folder.stat().st_mode & 0o666  # as the umask left it; asking for the umask would change it for a moment
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
        sync(path)
    sync(folder)
