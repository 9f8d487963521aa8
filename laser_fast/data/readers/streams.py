"""Decoded lines of a file or of an archive's member, gzipped or not, with their numbers."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from laser_fast.data.readers.archives import BROKEN, ArchiveMember, open_member
from laser_fast.data.readers.bad_rows import BadRowError, BadRows


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
_REPORT_LINES = 2**13


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
    number = 0
    source = watched.source if isinstance(watched, WatchedSource) else watched
    report = watched.report if isinstance(watched, WatchedSource) else None
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"read_rows: the source must be a file, got {source}")
    try:
        with _opened(source) as (stream, file):
            for raw in stream:
                number += 1
                if report is not None and number % _REPORT_LINES == 0:
                    report(file.tell())
                yield raw
            if report is not None:
                report(file.tell())
    except BROKEN as error:
        state = "whole gzip data" if source.name.lower().endswith(".gz") else "readable"
        if isinstance(source, ArchiveMember):
            state += f" and {source.archive.name} a whole archive"
        raise ValueError(f"{source.name}: the file must be {state}, got {error} after line {number}") from error


class Lines:
    """Iterator over the decoded lines of a source with their line ends; a byte order mark is dropped.

    `number` is that of the line handed out last, from 1. A line that cannot be decoded is a bad row, or an error of
    the file where it is the header.
    """

    def __init__(self, source: Source, encoding: str, bad_rows: BadRows, *, header: bool) -> None:
        self.number = 0
        self._name = source.name
        self._raw = _raw_lines(source)
        self._encoding = encoding
        self._bad_rows = bad_rows
        self._header = header

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        for raw in self._raw:
            self.number += 1
            if self.number == 1 and self._encoding == "utf-8":
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                return raw.decode(self._encoding)
            except UnicodeDecodeError as error:
                rule = f"the text must be {self._encoding.upper()}"
                bad = BadRowError(
                    f"{self._name}: {rule}, got byte {raw[error.start]:#04x} in line {self.number}",
                    f"{self._name}: {rule}",
                )
                if self._header and self.number == 1:
                    raise bad from error
                self._bad_rows.add(bad)
        raise StopIteration
