"""Reading the item file: ids and text columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from laser_fast.data.readers.bad_rows import BadRowError, BadRows
from laser_fast.data.readers.layouts import Layout
from laser_fast.data.readers.rows import column_types, read_rows
from laser_fast.data.readers.streams import Source
from laser_fast.data.readers.values import parse_id, parse_text


@dataclass(frozen=True)
class ItemTexts:
    """How the rows of an item file become texts.

    Args:
        columns: text columns to read.
        joiners: what stands between the entries of a list, by column; elsewhere a comma and a space.
        repeated: an item that occurs twice is an error, or its first row counts.
    """

    columns: tuple[str, ...]
    joiners: Mapping[str, str] | None = None
    repeated: Literal["error", "first"] = "error"


def default_text_columns(source: Source, id_column: str) -> list[str]:
    """All columns but the id; of RecBole files those that hold tokens (numbers are no text)."""
    types = column_types(source)
    return [name for name, kind in types.items() if name != id_column and kind in ("", "token", "token_seq")]


def read_items(
    source: Source,
    id_column: str,
    texts: Sequence[str] | ItemTexts,
    *,
    layout: Layout | None = None,
    bad_rows: BadRows | None = None,
) -> tuple[list[str], dict[str, list[str]]]:
    """External ids and texts of all items, in the order of the file; texts are as in the file, not cleaned.

    A text is missing (and "") where the format itself says so: a null or NaN of JSON and Parquet, a key that an object
    lacks. Words for it ("None", "NULL") stay words: there is a film of that name.

    Args:
        source: the item file.
        id_column: name of the column with the ids.
        texts: names of the text columns, or how to read them.
        layout: how rows stand in the file; None: by the ending of its name.
        bad_rows: takes the rows that cannot be used; None raises the first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, an id is bad or occurs twice, or a text is none; with the line number.
    """
    if not isinstance(texts, ItemTexts):
        texts = ItemTexts(tuple(texts))
    joiners, bad_rows = texts.joiners or {}, bad_rows or BadRows()
    lines: dict[str, int] = {}
    fields: dict[str, list[str]] = {column: [] for column in texts.columns}
    for row in read_rows(source, [id_column, *texts.columns], layout, bad_rows, dates_as_text=True):
        try:
            item = parse_id(row, id_column, row.values[0])
            if item in lines:
                if texts.repeated == "first":
                    bad_rows.repeated_items += 1
                    continue
                raise BadRowError(
                    str(row.error(f"item ids must be distinct and line {lines[item]} has this one", id_column, item)),
                    f"{row.file}: item ids must be distinct, column {id_column!r}",
                )
            values = [
                parse_text(row, column, value, joiners.get(column, ", "))
                for column, value in zip(texts.columns, row.values[1:], strict=True)
            ]
        except BadRowError as error:
            bad_rows.add(error)
            continue
        lines[item] = row.line
        for column, value in zip(texts.columns, values, strict=True):
            fields[column].append(value)
    return list(lines), fields
