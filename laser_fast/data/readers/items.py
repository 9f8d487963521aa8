"""Reading the item file: ids and text columns."""

from collections.abc import Sequence
from pathlib import Path

from laser_fast.data.readers.rows import column_types, read_rows
from laser_fast.data.readers.values import parse_id, parse_text


def default_text_columns(path: Path, id_column: str) -> list[str]:
    """All columns but the id; of RecBole files those that hold tokens (numbers are no text)."""
    return [
        name for name, kind in column_types(path).items() if name != id_column and kind in ("", "token", "token_seq")
    ]


def read_items(path: Path, id_column: str, text_columns: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """External ids and texts of all items, in the order of the file; texts are as in the file, not cleaned.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, an id is bad or occurs twice, or a text is none; with the line number.
    """
    lines: dict[str, int] = {}
    fields: dict[str, list[str]] = {column: [] for column in text_columns}
    for row in read_rows(path, [id_column, *text_columns]):
        item = parse_id(row, id_column, row.values[0])
        if item in lines:
            raise row.error(f"item ids must be distinct and line {lines[item]} has this one", id_column, item)
        lines[item] = row.line
        for column, value in zip(text_columns, row.values[1:], strict=True):
            fields[column].append(parse_text(row, column, value))
    return list(lines), fields
