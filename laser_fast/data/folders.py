"""Files and folders that are whole or absent: written beside the target under another name, then renamed."""

import json
import os
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
    old one is called `NAME.old`; if the process dies right then, `whole_directory` finds it there.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.{secrets.token_hex(6)}.partial")
    fresh.mkdir()
    try:
        yield fresh
        for path in fresh.iterdir():
            _sync(path)
        old = _old(directory)
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        fresh.rename(directory)
        _sync(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def whole_directory(directory: Path) -> Path:
    """`directory`, or what it was about to replace if the process died between the two renames of `replace_directory`.

    Raises:
        FileNotFoundError: neither exists.
    """
    for candidate in (directory, _old(directory)):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"no such folder: {str(directory)!r}")


def _old(directory: Path) -> Path:
    return directory.with_name(directory.name + ".old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
