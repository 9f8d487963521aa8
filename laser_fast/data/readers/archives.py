"""Files inside zip and tar archives, read in place: nothing is ever extracted to disk.

Every member is checked before any is read. Names that lead out of a folder, links, devices and encrypted members are
refused by name, and so is an archive whose stated size unpacked is beyond a bound. No more bytes of a member are read
than it states, so the stated size is a true bound.
"""

import bz2
import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

MAX_UNPACKED_BYTES = 8 * 2**30
"""Default bound of what an archive may hold; the largest MovieLens release holds about 1 GB."""

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
BROKEN = (
    EOFError, zlib.error, lzma.LZMAError, struct.error, zipfile.BadZipFile, tarfile.TarError, NotImplementedError,
    RuntimeError, OverflowError, UnicodeError, OSError, ValueError,
)  # fmt: skip
"""What the standard library raises for damaged or unusual archives."""
_LONGEST_READ = 2**26  # tarfile reads the records of long names at once, as long as they say they are
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class ArchiveMember:
    """A file in an archive that `archive_members` has checked; `name` is its own name without folders."""

    archive: Path
    member: str

    @property
    def name(self) -> str:
        """The last part of the member's name."""
        return self.member.rpartition("/")[2]


class _Bounded(io.RawIOBase):
    """A stream that hands out at most `_LONGEST_READ` bytes at once, so that a false length cannot fill the memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_READ:
            raise tarfile.ReadError(f"a record of {size} bytes")
        return self._stream.read(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
        super().close()


def is_archive(path: Path) -> bool:
    """Whether the name of `path` ends as that of an archive."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def _tar_stream(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if start.startswith(b"BZh"):
        return cast(IO[bytes], bz2.open(path, "rb"))
    if start == b"\xfd7zXZ\x00":
        return cast(IO[bytes], lzma.open(path, "rb"))
    return path.open("rb")


@contextmanager
def _opened_tar(path: Path) -> Iterator[tarfile.TarFile]:
    with _Bounded(_tar_stream(path)) as stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as archive:
        yield archive


def _refuse(path: Path, rule: str, member: str) -> ValueError:
    return ValueError(f"{path.name}: a member of an archive must {rule}, got {member!r}; nothing was read")


def _check_name(path: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or _DRIVE.match(name) or ".." in parts or "\0" in name:
        raise _refuse(path, "have a name inside the archive (no absolute path, no '..')", name)


def _zip_members(path: Path) -> Iterator[tuple[str, int]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            _check_name(path, info.orig_filename)
            mode = info.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refuse(path, "be a file or a folder (no link, no device)", info.filename)
            if info.flag_bits & 1:
                raise _refuse(path, "not be encrypted", info.filename)
            if not info.is_dir():
                yield info.filename, info.file_size


def _tar_members(path: Path) -> Iterator[tuple[str, int]]:
    with _opened_tar(path) as archive:
        for info in archive:
            _check_name(path, info.name)
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise _refuse(path, "be a file or a folder (no link, no device)", info.name)
            if info.isreg():
                yield info.name, info.size


def archive_members(path: Path, max_bytes: int = MAX_UNPACKED_BYTES) -> list[ArchiveMember]:
    """The files of a zip or tar archive (also gzip, bzip2, xz), in its order, after every member was checked.

    Args:
        path: the archive; its name ends in one of `ARCHIVE_SUFFIXES`.
        max_bytes: most bytes that all members together may state.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a member is refused, a name occurs twice, too much is stated, or the archive is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"archive_members: the archive must be a file, got {path}")
    members = _zip_members(path) if path.name.lower().endswith(".zip") else _tar_members(path)
    found: dict[str, ArchiveMember] = {}
    total = 0
    try:
        while True:
            try:
                name, size = next(members)
            except StopIteration:
                break
            total += size
            if total > max_bytes:
                raise ValueError(
                    f"{path.name}: an archive must unpack to at most {max_bytes:,} bytes, got {total:,} up to {name!r}"
                    "; raise the bound if you trust it"
                )
            if name in found:
                raise _refuse(path, "have a name of its own", name)
            found[name] = ArchiveMember(path, name)
    except BROKEN as error:
        if type(error) is ValueError and str(error).startswith(f"{path.name}: "):
            raise
        raise ValueError(f"{path.name}: the file must be a whole zip or tar archive, got {error!r}") from error
    return list(found.values())


@contextmanager
def open_member(member: ArchiveMember) -> Iterator[BinaryIO]:
    """The bytes of a member as a stream that cannot seek outside of it."""
    if member.archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(member.archive) as archive, archive.open(member.member) as stream:
            yield cast(BinaryIO, stream)
        return
    with _opened_tar(member.archive) as tar:
        stream_in_tar = tar.extractfile(member.member)
        if stream_in_tar is None:
            raise _refuse(member.archive, "be a file", member.member)
        with stream_in_tar:
            yield cast(BinaryIO, stream_in_tar)
