"""Decoded lines of a file or of an archive's member, gzipped or not, with their numbers."""

import gzip
import io
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from laser_fast.data.readers.archives import BROKEN, ArchiveMember, open_member
from laser_fast.data.readers.bad_rows import BadRowError


@dataclass(frozen=True)
class WatchedSource:
    """A file, or a file in an archive, whose reading is reported.

    Args:
        source: what is read.
        report: called now and then with how many bytes of the file are read so far: of a `.gz` the zipped ones, of a
            file in an archive those it holds.
    """

    source: Path | ArchiveMember
    report: Callable[[int], object]

    @property
    def name(self) -> str:
        """That of the source."""
        return self.source.name


Source = Path | ArchiveMember | WatchedSource
"""Where rows come from: a file, or a file in an archive."""
MAX_ROW_BYTES = 2**24
"""Longest line, and longest row of several lines: what is longer is refused before it is in memory."""
_CHUNK_BYTES = 2**18


@contextmanager
def _opened(source: Path | ArchiveMember) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The bytes of a source, unzipped where the name ends in `.gz`, and the stream they are taken from."""
    with source.open("rb") if isinstance(source, Path) else open_member(source) as raw:
        if not source.name.lower().endswith(".gz"):
            yield raw, raw
            return
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast(BinaryIO, stream), raw


def _raw_lines(watched: Source) -> Iterator[bytes]:
    """Lines with their ends; of one that is longer than `MAX_ROW_BYTES` only a beginning that is longer than these."""
    number = 0
    source = watched.source if isinstance(watched, WatchedSource) else watched
    report = watched.report if isinstance(watched, WatchedSource) else None
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"read_rows: the source must be a file, got {source}")
    try:
        with _opened(source) as (stream, file):
            begun = bytearray()  # of a line whose end was not read yet
            while chunk := stream.read(_CHUNK_BYTES):
                begun += chunk
                if b"\n" in chunk:
                    lines = io.BytesIO(begun).readlines()
                    begun = bytearray(b"" if lines[-1].endswith(b"\n") else lines.pop())
                    yield from lines
                    number += len(lines)
                if len(begun) > MAX_ROW_BYTES:
                    yield bytes(begun)
                    number += 1
                    begun = bytearray(_behind_line(stream))  # only now: whoever refuses the line does not wait
                if report is not None:
                    report(file.tell())
            if begun:
                yield bytes(begun)
    except BROKEN as error:
        state = "whole gzip data" if source.name.lower().endswith(".gz") else "readable"
        if isinstance(source, ArchiveMember):
            state += f" and {source.archive.name} a whole archive"
        raise ValueError(f"{source.name}: the file must be {state}, got {error} after line {number}") from error


def _behind_line(stream: BinaryIO) -> bytes:
    """Pass over the rest of a line; what was read of the next one."""
    while chunk := stream.read(_CHUNK_BYTES):
        _, end, behind = chunk.partition(b"\n")
        if end:
            return behind
    return b""


class Lines:
    """Iterator over the decoded lines of a source with their line ends; a byte order mark is dropped.

    `number` is that of the line handed out last, from 1. A line that is no text or too long raises a `BadRowError`;
    the next one can be asked for all the same.
    """

    def __init__(self, source: Source, encoding: str) -> None:
        self.number = 0
        self.name = source.name
        self._raw = _raw_lines(source)
        self._encoding = encoding
        self._again: deque[bytes] = deque()
        self._since_mark: list[bytes] | None = None

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        raw = self._again.popleft() if self._again else next(self._raw)
        self.number += 1
        if self._since_mark is not None:
            self._since_mark.append(raw)
        if len(raw) > MAX_ROW_BYTES:
            raise self._bad(f"a line must have at most {MAX_ROW_BYTES:,} bytes", "more")
        if self.number == 1 and self._encoding == "utf-8":
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            return raw.decode(self._encoding)
        except UnicodeDecodeError as error:
            rule = f"the text must be {self._encoding.upper()}"
            raise self._bad(rule, f"byte {raw[error.start]:#04x}") from error

    def _bad(self, rule: str, found: str) -> BadRowError:
        return BadRowError(f"{self.name}: {rule}, got {found} in line {self.number}", f"{self.name}: {rule}")

    def mark(self) -> None:
        """Remember the lines from here on, for `rewind`."""
        self._since_mark = []

    def rewind(self) -> None:
        """Go back to the mark: the lines since then come once more."""
        since = self._since_mark or []
        self._again.extendleft(reversed(since))
        self.number -= len(since)
        self._since_mark = []

    def forget_mark(self) -> None:
        """Remember no more lines."""
        self._since_mark = None
