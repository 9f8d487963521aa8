"""Rows of a source file, one at a time, each with its line number; `layouts` says how the files look."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from laser_fast.data.readers.archives import ArchiveMember
from laser_fast.data.readers.bad_rows import BadRowError, BadRows
from laser_fast.data.readers.delimited import split_rows
from laser_fast.data.readers.layouts import RECBOLE_TYPES, Layout, layout_of
from laser_fast.data.readers.parquet import parquet_columns, parquet_rows
from laser_fast.data.readers.streams import Lines, Source, WatchedSource

MAX_JSON_KEYS = 1_000
"""Most different keys of a file of JSON lines where all of them are columns: ids as keys are no table."""


class Row(NamedTuple):
    """One row: its first line (or its number), the values of the columns asked for (None where JSON lacks a key), and
    how many lines it has."""

    file: str
    line: int
    values: list[Any]
    unit: str = "line"
    lines: int = 1

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        if self.lines == 1:
            return f"{self.unit} {self.line}"
        return f"{self.unit}s {self.line} to {self.line + self.lines - 1}"

    def error(self, rule: str, column: str, value: object, remedy: str = "") -> BadRowError:
        """The error that names this row, to be raised by whoever finds a value wrong; `remedy` says what to do."""
        return BadRowError(
            f"{self.file}: {rule}, got {shortened(value)} in {self.place}, column {column!r}"
            + (f"; {remedy}" if remedy else ""),
            f"{self.file}: {rule}, column {column!r}",
            self.lines,
        )


def shortened(value: object, longest: int = 200) -> str:
    """`value` as an error shows it: cut after `longest` characters."""
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


def _bad_row(source: Source, rule: str, found: str, lines: int = 1) -> BadRowError:
    return BadRowError(f"{source.name}: {rule}, got {found}", f"{source.name}: {rule}", lines)


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


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values, of which JSON itself would let the last of equal keys win."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shortened(next(key for key in keys if keys.count(key) > 1))} twice")
    return value


_decode_json = json.JSONDecoder(object_pairs_hook=_distinct).decode


def _objects(source: Source, encoding: str, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = Lines(source, encoding)
    rule = "a line must be a JSON object"
    while True:
        try:
            line = next(lines)
            if not line.strip():
                continue
            value = _decode_json(line)
        except StopIteration:
            return
        except BadRowError as error:
            bad_rows.add(error)
        except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
            bad_rows.add(_bad_row(source, rule, f"{error} in line {lines.number}"))
        else:
            if isinstance(value, dict):
                yield lines.number, value
            else:
                bad_rows.add(_bad_row(source, rule, f"{type(value).__name__} in line {lines.number}"))


def _json_keys(source: Source, encoding: str, wanted: Sequence[str] | None = None) -> list[str]:
    """Keys of all objects, by first appearance; with `wanted` only up to the object where all of these were seen.

    Bad lines are passed over: whoever reads the rows meets them.
    """
    keys: dict[str, None] = {}
    ignored = BadRows(skip=True, listed=1)
    for number, value in _objects(source, encoding, ignored):
        if not value.keys() <= keys.keys():
            keys |= dict.fromkeys(value)
        if wanted is not None:
            if keys.keys() >= set(wanted):
                break
        elif len(keys) > MAX_JSON_KEYS:
            raise ValueError(
                f"{source.name}: objects must have at most {MAX_JSON_KEYS:,} different keys, got {len(keys):,} up to "
                f"line {number}; name the columns that you need"
            )
    if not keys:
        found = f"none: {ignored.first[0]}" if ignored.first else "an empty file"
        raise ValueError(f"{source.name}: the file must hold a header or a row, got {found}")
    return list(keys)


def _is_blank(values: list[str]) -> bool:
    return not values or values == [""]


def _checked_names(source: Source, columns: dict[str, str]) -> dict[str, str]:
    for name in columns:
        if not is_unicode(name):
            raise ValueError(f"{source.name}: the name of a column must be valid Unicode, got {name!r}")
    return columns


def column_types(source: Source, layout: Layout | None = None) -> dict[str, str]:
    """Names of a file's columns, in order, with their RecBole types ("" for the other formats).

    For JSON lines these are the keys of all objects of the file, by first appearance.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or its name or header is not as `layouts` says.
    """
    layout = layout or layout_of(source.name)
    if layout.columns is not None:
        return dict.fromkeys(layout.columns, "")
    if layout.kind == "parquet":
        return _checked_names(source, dict.fromkeys(parquet_columns(_file(source)), ""))
    if layout.kind == "json":
        return _checked_names(source, dict.fromkeys(_json_keys(source, layout.encoding), ""))
    _, _, values = next(split_rows(Lines(source, layout.encoding), layout, BadRows()), (0, 0, []))
    if not _is_blank(values):
        return _checked_names(source, _header(source, layout, values))
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
    rows = split_rows(Lines(source, layout.encoding), layout, bad_rows)
    if layout.columns is None:
        next(rows)
    width, name = len(names), source.name
    for number, lines, values in rows:
        if len(values) != width:
            if _is_blank(values):
                continue
            shown = shortened(values if len(values) < 8 else values[:8])
            place = Row(name, number, values, lines=lines).place
            rule = f"a row must have {width} values"
            bad_rows.add(_bad_row(source, rule, f"{len(values)} in {place}: {shown}", lines))
            continue
        chosen = [values[position] for position in positions]
        yield Row(name, number, chosen) if lines == 1 else Row(name, number, chosen, lines=lines)


def read_rows(
    source: Source,
    columns: Sequence[str],
    layout: Layout | None = None,
    bad_rows: BadRows | None = None,
    *,
    dates_as_text: bool = False,
) -> Iterator[Row]:
    """The rows of a file, with the values of `columns` in that order: strings, or JSON or Parquet values.

    Blank lines are passed over. Memory does not grow with the file.

    Args:
        source: a file, or a file in an archive.
        columns: names of the columns wanted.
        layout: how the rows stand in it; None: by the ending of the name.
        bad_rows: takes rows that are not as the layout says; None raises the first.
        dates_as_text: of Parquet columns; else they are seconds since 1970.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing (the message lists those there are), a row has too many or too few values, the
            file holds no row, or is not what its name says; with the line number.
    """
    layout, name = layout or layout_of(source.name), source.name
    bad_rows = bad_rows or BadRows()
    if layout.kind == "json" and layout.columns is None:  # only as far as needed: a log is long
        names = _json_keys(source, layout.encoding, columns)
    else:
        names = list(column_types(source, layout))
    if layout.kind == "json":
        _positions(source, names, columns)
        rows: Iterator[Row] = (
            Row(name, number, [value.get(column) for column in columns])
            for number, value in _objects(source, layout.encoding, bad_rows)
        )
    elif layout.kind == "parquet":
        _positions(source, names, columns)
        report = source.report if isinstance(source, WatchedSource) else None
        found = parquet_rows(_file(source), columns, report, dates_as_text=dates_as_text)
        rows = (Row(name, number, values, "row") for number, values in found)
    else:
        rows = _text_rows(source, layout, columns, names, bad_rows)
    first = next(rows, None)
    if first is not None:
        yield first
        yield from rows
    elif not bad_rows.total:
        raise ValueError(f"{name}: the file must hold at least one row, got none below the header")
