"""Writes that a power cut cannot undo once they return."""

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Write what the system still holds of a file, or of the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_no_link(path: Path, flags: int) -> int:
    """`os.open` of a file, created if need be with the modes of new files; raises FileExistsError for a link."""
    try:
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        rule = "open_no_link: the target must be a file"
        raise FileExistsError(f"{rule}, got the link {str(path)!r}; remove it") from None


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file, opened by `open_no_link`."""
    descriptor = open_no_link(path, os.O_WRONLY | os.O_APPEND)
    with os.fdopen(descriptor, "ab") as file:
        file.write(line + b"\n")
        file.flush()
        os.fsync(descriptor)


def make_directory(path: Path) -> None:
    """Make the folder and those around it; raises NotADirectoryError where a file is in place of one."""
    for folder in (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            got = f"got the file {str(folder)!r} in place of one; choose another place"
            raise NotADirectoryError(f"make_directory: an output must lie in folders, {got}")
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)
