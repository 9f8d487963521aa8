"""Rows of a Parquet file, read in batches: memory does not grow with the file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_BATCH_ROWS = 65_536
_BATCH_BYTES = 2**28
_BROKEN = (pa.ArrowException, OSError, UnicodeError, ValueError, MemoryError, NotImplementedError, OverflowError)


@contextmanager
def _opened(path: Path, columns: Sequence[str] = ()) -> Iterator[Any]:
    """The file; those of `columns` whose dictionary holds a long text come as dictionaries: it is in memory once."""
    if not path.is_file():
        raise FileNotFoundError(f"read_rows: the source must be a file, got {path}")
    try:
        file = pq.ParquetFile(path)
        if texts := [name for name in dict.fromkeys(columns) if _is_text(file.schema_arrow.field(name).type)]:
            file = pq.ParquetFile(path, read_dictionary=_with_long_dictionary(path, texts))
    except _BROKEN as error:
        raise ValueError(f"{path.name}: the file must be a whole Parquet file, got {_first_line(error)}") from error
    with file:
        yield file


def _with_long_dictionary(path: Path, texts: list[str]) -> list[str]:
    """Those of the columns that could say a long text for every row of a batch in a few bytes."""
    longest = dict.fromkeys(texts, 0)
    with pq.ParquetFile(path, read_dictionary=texts, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            first = next(file.iter_batches(1, row_groups=[group], columns=texts), None)
            for name, column in zip(texts, () if first is None else first.select(texts).columns, strict=False):
                longest[name] = max(longest[name], pc.max(pc.binary_length(column.dictionary)).as_py() or 0)
    return [name for name in texts if longest[name] * _BATCH_ROWS > _BATCH_BYTES]


def _is_text(kind: Any) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def parquet_columns(path: Path) -> list[str]:
    """Names of the top-level columns, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Parquet file, or two columns have one name.
    """
    with _opened(path) as file:
        names = list(file.schema_arrow.names)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path.name}: columns must have distinct names, got {repeated[0]!r} twice")
    return names


def _in_micros(column: Any) -> Any:
    """Times in UTC to the microsecond; one that 64 bits cannot count is an error and does not wrap around."""
    options = pc.CastOptions(target_type=pa.timestamp("us"), allow_time_truncate=True)
    return pc.cast(column, options=options)


def _seconds(column: Any) -> list[int | float | None]:
    """Times as seconds since 1970 in UTC: whole numbers where they are, else to the microsecond."""
    micros = _in_micros(column).cast(pa.int64()).to_pylist()
    return [
        None if time is None else time // 1_000_000 if time % 1_000_000 == 0 else time / 1_000_000 for time in micros
    ]


def _batch_rows(metadata: Any) -> int:
    """How many rows to read at once: fewer where rows are long, by what the file says of itself."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(row_bytes, 1))))


class _Dictionaries:
    """Values of the dictionary that a column had last: the batches of a row group share one."""

    def __init__(self, as_text: bool) -> None:
        self._as_text = as_text
        self._last: dict[str, tuple[Any, list[Any]]] = {}

    def values(self, name: str, column: Any) -> list[Any]:
        """Python values of the column `name` of a batch."""
        if not pa.types.is_dictionary(column.type):
            return _values(column, self._as_text)
        dictionary, values = self._last.get(name, (None, []))
        if dictionary is None or not dictionary.equals(column.dictionary):
            dictionary, values = column.dictionary, _values(column.dictionary, self._as_text)
            self._last[name] = dictionary, values
        return [None if index is None else values[index] for index in column.indices.to_pylist()]


def _values(column: Any, as_text: bool) -> list[Any]:
    """Python values of a column without a dictionary, see `parquet_rows`."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        if not as_text:
            return _seconds(column)
        column = column if pa.types.is_date32(kind) else _in_micros(column)
        return [None if text is None else text.removesuffix(".000000") for text in column.cast(pa.string()).to_pylist()]
    if pa.types.is_float32(kind):  # the shortest number that rounds to it, so 4.1 is not below 4.1
        column = column.cast(pa.string()).cast(pa.float64())
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def parquet_rows(
    path: Path, columns: Sequence[str], report: Callable[[int], object] | None = None, *, dates_as_text: bool = False
) -> Iterator[tuple[int, list[Any]]]:
    """Number (from 1) and values of every row, for `columns` in that order; a missing value is None.

    Decimals are exact (`decimal.Decimal`), dates and times seconds since 1970 in UTC, text that is not UTF-8 is bytes.

    Args:
        path: the file.
        columns: names of columns there are.
        report: called after every batch with the part of the file's bytes that its rows so far make up.
        dates_as_text: dates and times as ISO text in UTC.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole Parquet file.
    """
    number = 0
    with _opened(path, columns) as file:
        dictionaries = _Dictionaries(dates_as_text)
        batches = file.iter_batches(batch_size=_batch_rows(file.metadata), columns=list(dict.fromkeys(columns)))
        while True:
            try:
                batch = next(batches, None)
                values = None if batch is None else [dictionaries.values(name, batch.column(name)) for name in columns]
            except _BROKEN as error:
                raise ValueError(
                    f"{path.name}: the file must be a whole Parquet file, got {_first_line(error)} after row {number}"
                ) from error
            if values is None:
                return
            for row in zip(*values, strict=True):
                number += 1
                yield number, list(row)
            if report is not None:
                report(path.stat().st_size * number // file.metadata.num_rows)
