"""Rows of a source file, one at a time, each with its line number; `layouts` says how the files look."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from laser_fast.data.readers.archives import ArchiveMember
from laser_fast.data.readers.bad_rows import BadRowError, BadRows
from laser_fast.data.readers.layouts import RECBOLE_TYPES, Layout, layout_of
from laser_fast.data.readers.parquet import parquet_columns, parquet_rows
from laser_fast.data.readers.streams import Lines, Source, WatchedSource


class Row(NamedTuple):
    """One row: where it stands and the values of the columns asked for (None where JSON lacks a key)."""

    file: str
    line: int
    values: list[Any]
    unit: str = "line"

    def error(self, rule: str, column: str, value: object) -> BadRowError:
        """The error that names this row, to be raised by whoever finds a value wrong."""
        return BadRowError(
            f"{self.file}: {rule}, got {_shortened(value)} in {self.unit} {self.line}, column {column!r}",
            f"{self.file}: {rule}, column {column!r}",
        )


def _shortened(value: object, longest: int = 200) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}..."


def is_unicode(text: str) -> bool:
    """Whether `text` is valid Unicode: JSON escapes can spell half a surrogate pair, which no file can hold."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bad_row(source: Source, rule: str, found: str) -> BadRowError:
    return BadRowError(f"{source.name}: {rule}, got {found}", f"{source.name}: {rule}")


def _split_lines(source: Source, layout: Layout, bad_rows: BadRows) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of every row, the header included."""
    lines = Lines(source, layout.encoding, bad_rows, header=layout.columns is None)
    if layout.kind == "plain":
        for line in lines:
            yield lines.number, line.rstrip("\r\n").split(layout.delimiter)
        return
    reader = csv.reader(lines, delimiter=layout.delimiter, strict=True)
    while True:
        first = lines.number == 0
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad = _bad_row(source, "the row must be well-formed", f"{error} in line {lines.number}")
            if first and layout.columns is None:
                raise bad from error
            bad_rows.add(bad)
            continue
        yield lines.number, values


def _header(source: Source, layout: Layout, values: list[str]) -> dict[str, str]:
    """Column names with their RecBole types ("" in other formats)."""
    columns: dict[str, str] = {}
    for value in values:
        name, kind = value, ""
        if layout.typed:
            name, _, kind = value.rpartition(":")
            if not name or kind not in RECBOLE_TYPES:
                raise ValueError(
                    f"{source.name}: a column must be declared as name:type with a type of {', '.join(RECBOLE_TYPES)}, "
                    f"got {value!r} in line 1"
                )
        if name in columns:
            raise ValueError(f"{source.name}: columns must have distinct names, got {name!r} twice in line 1")
        columns[name] = kind
    return columns


def _objects(source: Source, encoding: str, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = Lines(source, encoding, bad_rows, header=False)
    rule = "a line must be a JSON object"
    for line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
            bad_rows.add(_bad_row(source, rule, f"{error} in line {lines.number}"))
            continue
        if isinstance(value, dict):
            yield lines.number, value
        else:
            bad_rows.add(_bad_row(source, rule, f"{type(value).__name__} in line {lines.number}"))


def _is_blank(values: list[str]) -> bool:
    return not values or values == [""]


def _checked_names(source: Source, columns: dict[str, str]) -> dict[str, str]:
    for name in columns:
        if not is_unicode(name):
            raise ValueError(f"{source.name}: the name of a column must be valid Unicode, got {name!r}")
    return columns


def column_types(source: Source, layout: Layout | None = None, *, skip_bad_rows: bool = False) -> dict[str, str]:
    """Names of a file's columns, in order, with their RecBole types ("" for the other formats).

    For JSON lines these are the keys of the first object (with `skip_bad_rows`: of the first line that is one).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or its name or header is not as `layouts` says.
    """
    layout = layout or layout_of(source.name)
    if layout.columns is not None:
        return dict.fromkeys(layout.columns, "")
    if layout.kind == "parquet":
        return _checked_names(source, dict.fromkeys(parquet_columns(_file(source)), ""))
    ignored = BadRows(skip=skip_bad_rows, listed=0)
    if layout.kind == "json":
        for _, value in _objects(source, layout.encoding, ignored):
            return _checked_names(source, dict.fromkeys(value, ""))
    else:
        for _, values in _split_lines(source, layout, ignored):
            if not _is_blank(values):
                return _checked_names(source, _header(source, layout, values))
            break
    raise ValueError(f"{source.name}: the file must hold a header or a row, got an empty file")


def _file(source: Source) -> Path:
    if isinstance(source, WatchedSource):
        return _file(source.source)
    if isinstance(source, ArchiveMember):
        raise ValueError(f"read_rows: a Parquet file must lie outside of archives, got {source.name} in one")
    return source


def _positions(source: Source, available: Sequence[str], columns: Sequence[str]) -> list[int]:
    for column in columns:
        if column not in available:
            raise ValueError(f"{source.name}: unknown column, got {column!r}; available: {', '.join(available)}")
    return [list(available).index(column) for column in columns]


def _text_rows(
    source: Source, layout: Layout, columns: Sequence[str], names: Sequence[str], bad_rows: BadRows
) -> Iterator[Row]:
    positions = _positions(source, names, columns)
    rows = _split_lines(source, layout, bad_rows)
    if layout.columns is None:
        next(rows)
    width, name = len(names), source.name
    for number, values in rows:
        if _is_blank(values) and width > 1:
            continue
        if len(values) != width:
            shown = _shortened(values if len(values) < 8 else values[:8])
            bad_rows.add(
                _bad_row(source, f"a row must have {width} values", f"{len(values)} in line {number}: {shown}")
            )
            continue
        yield Row(name, number, [values[position] for position in positions])


def read_rows(
    source: Source, columns: Sequence[str], layout: Layout | None = None, bad_rows: BadRows | None = None
) -> Iterator[Row]:
    """The rows of a file, with the values of `columns` in that order: strings, or JSON or Parquet values.

    Blank lines are passed over. Memory does not grow with the file.

    Args:
        source: a file, or a file in an archive.
        columns: names of the columns wanted.
        layout: how the rows stand in it; None: by the ending of the name.
        bad_rows: takes rows that are not as the layout says; None raises the first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing (the message lists those there are), a row has too many or too few values, the
            file holds no row, or is not what its name says; with the line number.
    """
    layout, name = layout or layout_of(source.name), source.name
    bad_rows = bad_rows or BadRows()
    names = list(column_types(source, layout, skip_bad_rows=bad_rows.skip))
    empty = True
    if layout.kind == "json":
        _positions(source, names, columns)
        rows: Iterator[Row] = (
            Row(name, number, [value.get(column) for column in columns])
            for number, value in _objects(source, layout.encoding, bad_rows)
        )
    elif layout.kind == "parquet":
        _positions(source, names, columns)
        report = source.report if isinstance(source, WatchedSource) else None
        rows = (Row(name, number, values, "row") for number, values in parquet_rows(_file(source), columns, report))
    else:
        rows = _text_rows(source, layout, columns, names, bad_rows)
    for row in rows:
        empty = False
        yield row
    if empty and not bad_rows.total:
        raise ValueError(f"{name}: the file must hold at least one row, got none below the header")
