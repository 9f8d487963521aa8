"""Decoded lines of a file or of an archive's member, gzipped or not, with their numbers."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from laser_fast.data.readers.archives import BROKEN, ArchiveMember, open_member
from laser_fast.data.readers.bad_rows import BadRowError, BadRows

Source = Path | ArchiveMember
"""Where rows come from: a file, or a file in an archive."""


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """The bytes of a source, unzipped where the name ends in `.gz`."""
    zipped = source.name.lower().endswith(".gz")
    if isinstance(source, Path):
        with cast(BinaryIO, gzip.open(source, "rb")) if zipped else source.open("rb") as stream:
            yield stream
        return
    with open_member(source) as stream:
        yield cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if zipped else stream


def _raw_lines(source: Source) -> Iterator[bytes]:
    number = 0
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"read_rows: the source must be a file, got {source}")
    try:
        with opened(source) as stream:
            for raw in stream:
                number += 1
                yield raw
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
