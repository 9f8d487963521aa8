"""Readers of source files: RecBole atomic files, CSV, TSV and JSON lines, each also gzipped, row by row."""

from laser_fast.data.readers.interactions import InteractionColumns, Interactions, UnknownItems, read_interactions
from laser_fast.data.readers.items import read_items
from laser_fast.data.readers.rows import Row, column_types, read_rows

__all__ = [
    "InteractionColumns",
    "Interactions",
    "Row",
    "UnknownItems",
    "column_types",
    "read_interactions",
    "read_items",
    "read_rows",
]
