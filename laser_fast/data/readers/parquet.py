"""Rows of a Parquet file, read in batches: memory does not grow with the file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_BATCH_ROWS = 65_536
_BROKEN = (pa.ArrowException, OSError, UnicodeError, ValueError, MemoryError, NotImplementedError, OverflowError)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"read_rows: the source must be a file, got {path}")
    try:
        file = pq.ParquetFile(path)
    except _BROKEN as error:
        raise ValueError(f"{path.name}: the file must be a whole Parquet file, got {_first_line(error)}") from error
    with file:
        yield file


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def parquet_columns(path: Path) -> list[str]:
    """Names of the top-level columns, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Parquet file.
    """
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def _seconds(column: Any) -> list[int | float | None]:
    """Times as seconds since 1970 in UTC: whole numbers where they are, else to the microsecond."""
    micros = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).to_pylist()
    return [
        None if time is None else time // 1_000_000 if time % 1_000_000 == 0 else time / 1_000_000 for time in micros
    ]


def _values(column: Any) -> list[Any]:
    """Python values of a column: times in seconds, decimals as floats, text that is not UTF-8 as bytes."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _seconds(column.cast(kind))
    if pa.types.is_decimal(kind):
        return list(pc.cast(column.cast(kind), pa.float64(), safe=False).to_pylist())
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
    path: Path, columns: Sequence[str], report: Callable[[int], object] | None = None
) -> Iterator[tuple[int, list[Any]]]:
    """Number (from 1) and values of every row, for `columns` in that order; a missing value is None.

    `report` is called after every batch with the part of the file's bytes that its rows so far make up.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole Parquet file.
    """
    number = 0
    with _opened(path) as file:
        batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=list(dict.fromkeys(columns)))
        while True:
            try:
                batch = next(batches, None)
                values = None if batch is None else [_values(batch.column(name)) for name in columns]
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
