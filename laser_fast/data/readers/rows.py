"""Rows of a source file, one at a time, each with its line number; the format follows from the file name.

`.csv`, `.tsv`: a header, comma or tab between values, quotes as in RFC 4180. `.jsonl`, `.ndjson`: one object a line.
`.inter`, `.item`, `.user` (RecBole atomic files): tab between values, no quotes, a header of `name:type` with the types
token, token_seq, float and float_seq. All in UTF-8, all also with `.gz` behind.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")
_RECBOLE_SUFFIXES = (".inter", ".item", ".user")
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_SUFFIXES = (".csv", ".tsv", *_JSON_SUFFIXES, *_RECBOLE_SUFFIXES)


class Row(NamedTuple):
    """One row: where it stands and the values of the columns asked for (None where JSON lacks a key)."""

    file: str
    line: int
    values: list[Any]

    def error(self, rule: str, column: str, value: object) -> ValueError:
        """The error that names this row, to be raised by whoever finds a value wrong."""
        return ValueError(f"{self.file}: {rule}, got {value!r} in line {self.line}, column {column!r}")


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"read_rows: the file name must end in {', '.join(_SUFFIXES)} or one of these and .gz, got {path.name}"
        )
    return suffix


def _opened(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    """Decoded lines with their line ends; a byte order mark is dropped."""
    number = 0
    try:
        with _opened(path) as stream:
            for number, raw in enumerate(stream, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name}: the text must be UTF-8, got byte {error.object[error.start]:#04x} in line {number}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name}: the file must be whole gzip data, got {error} after line {number}") from error


def _split_lines(path: Path, suffix: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of every row of a file with a header, the header included."""
    if suffix in _RECBOLE_SUFFIXES:
        for number, line in enumerate(_lines(path), start=1):
            yield number, line.rstrip("\r\n").split("\t")
        return
    reader = csv.reader(_lines(path), delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    try:
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise ValueError(f"{path.name}: the row must be well-formed, got {error} in line {reader.line_num}") from error


def _header(path: Path, suffix: str, values: list[str]) -> dict[str, str]:
    """Column names with their RecBole types ("" in other formats)."""
    columns: dict[str, str] = {}
    for value in values:
        name, kind = value, ""
        if suffix in _RECBOLE_SUFFIXES:
            name, _, kind = value.rpartition(":")
            if not name or kind not in RECBOLE_TYPES:
                raise ValueError(
                    f"{path.name}: a column must be declared as name:type with a type of {', '.join(RECBOLE_TYPES)}, "
                    f"got {value!r} in line 1"
                )
        if name in columns:
            raise ValueError(f"{path.name}: columns must have distinct names, got {name!r} twice in line 1")
        columns[name] = kind
    return columns


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path.name}: a line must be a JSON object, got {error} in line {number}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path.name}: a line must be a JSON object, got {type(value).__name__} in line {number}")
        yield number, value


def _is_blank(values: list[str]) -> bool:
    return not values or values == [""]


def column_types(path: Path) -> dict[str, str]:
    """Names of a file's columns, in order, with their RecBole types ("" for the other formats).

    For JSON lines these are the keys of the first object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or its name or header is not as the module says.
    """
    suffix = _suffix(path)
    if suffix in _JSON_SUFFIXES:
        for _, value in _objects(path):
            return dict.fromkeys(value, "")
    else:
        for _, values in _split_lines(path, suffix):
            if not _is_blank(values):
                return _header(path, suffix, values)
            break
    raise ValueError(f"{path.name}: the file must hold a header or a row, got an empty file")


def _positions(path: Path, available: Sequence[str], columns: Sequence[str]) -> list[int]:
    for column in columns:
        if column not in available:
            raise ValueError(f"{path.name}: unknown column, got {column!r}; available: {', '.join(available)}")
    return [list(available).index(column) for column in columns]


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file, with the values of `columns` in that order: strings, or JSON values.

    Blank lines are passed over. Memory does not grow with the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing (the message lists those there are), a row has too many or too few values, the
            file holds no row, or is not what its name says; with the line number.
    """
    suffix = _suffix(path)
    types, name = column_types(path), path.name
    positions = _positions(path, list(types), columns)
    empty = True
    if suffix in _JSON_SUFFIXES:
        for number, value in _objects(path):
            empty = False
            yield Row(name, number, [value.get(column) for column in columns])
    else:
        rows = _split_lines(path, suffix)
        next(rows)  # the header
        for number, values in rows:
            if _is_blank(values) and len(types) > 1:
                continue
            if len(values) != len(types):
                raise ValueError(
                    f"{path.name}: a row must have {len(types)} values, got {len(values)} in line {number}: "
                    f"{values if len(values) < 8 else values[:8]}"
                )
            empty = False
            yield Row(name, number, [values[position] for position in positions])
    if empty:
        raise ValueError(f"{path.name}: the file must hold at least one row, got none below the header")
