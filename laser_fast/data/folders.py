"""Files and folders that are whole or absent: written beside the target under another name, then renamed.

Everything that lies beside a target `NAME` for a while has a drawn name, `.NAME.0123456789ab.partial` while it is
written and `.NAME.0123456789ab.old` while it is replaced, so that nobody's own files are in the way.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"
"""Ends the name of a file that is being written."""


def replace_file(path: Path, content: bytes) -> None:
    """Write beside and rename, so that the file is never half-written."""
    beside = path.with_name(f".{path.name}{PART}")
    beside.write_bytes(content)
    os.replace(beside, path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """`replace_file` with indented JSON."""
    replace_file(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Give a new empty folder beside `directory`; it replaces `directory` when the block ends without an error.

    A reader sees the old folder or the complete new one. A folder cannot be swapped in one step, so for a moment the
    old one has a drawn name; if the process dies right then, `whole_directory` finds it there.
    """
    with scratch_directory(directory) as fresh:
        yield fresh
        for path in fresh.iterdir():
            _sync(path)
        if directory.exists():
            _remove_replaced(directory)  # so that there is never more than one
            directory.rename(directory.with_name(f".{directory.name}.{secrets.token_hex(6)}.old"))
        fresh.rename(directory)
        _sync(directory.parent)
        _remove_replaced(directory)


@contextmanager
def scratch_directory(directory: Path) -> Iterator[Path]:
    """Give a new empty folder beside `directory`, removed at the end; `remove_leftovers` removes it after a kill."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh, lock = _fresh_folder(directory)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(lock)


def _fresh_folder(directory: Path) -> tuple[Path, int]:
    """A new folder beside `directory` and a descriptor of it, locked for as long as this process lives."""
    while True:
        fresh = directory.with_name(f".{directory.name}.{secrets.token_hex(6)}.partial")
        fresh.mkdir()
        lock = _locked(fresh)
        if lock is not None and fresh.is_dir():  # else `remove_leftovers` of another process came in between
            return fresh, lock


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None if another process has it or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
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


def remove_leftovers(directory: Path) -> None:
    """Remove what processes that were killed inside `replace_directory(directory)` left beside it.

    Folders of processes that still write are locked and stay. Where the process died between its two renames, the old
    folder gets its name back.
    """
    for path in _beside(directory, "partial"):
        if (lock := _locked(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
    for old in _beside(directory, "old"):
        if not directory.exists():
            old.rename(directory)
    _remove_replaced(directory)


def whole_directory(directory: Path) -> Path:
    """`directory`, or what it was about to replace if the process died between the two renames of `replace_directory`.

    Raises:
        FileNotFoundError: neither exists.
    """
    if directory.is_dir():
        return directory
    for old in _beside(directory, "old"):
        return old
    raise FileNotFoundError(f"no such folder: {str(directory)!r}")


def _remove_replaced(directory: Path) -> None:
    for old in _beside(directory, "old"):
        shutil.rmtree(old, ignore_errors=True)


def _beside(directory: Path, ending: str) -> list[Path]:
    """Folders beside `directory` that were made for it and have drawn names with this ending."""
    if not directory.parent.is_dir():
        return []
    pattern = re.compile(re.escape(f".{directory.name}.") + rf"[0-9a-f]{{12}}\.{ending}")
    return [path for path in directory.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
