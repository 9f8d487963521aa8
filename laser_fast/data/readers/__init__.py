"""Readers of source files, row by row: CSV, TSV, JSON lines, Parquet, RecBole, MovieLens and Amazon Reviews."""

from laser_fast.data.readers.archives import MAX_UNPACKED_BYTES, ArchiveMember, archive_members
from laser_fast.data.readers.bad_rows import BadRowError, BadRows
from laser_fast.data.readers.interactions import (
    EventRules,
    InteractionColumns,
    Interactions,
    UnknownItems,
    read_interactions,
)
from laser_fast.data.readers.item_rows import ItemTexts, read_items
from laser_fast.data.readers.layouts import Layout, layout_of
from laser_fast.data.readers.rows import Row, column_types, read_rows

__all__ = [
    "MAX_UNPACKED_BYTES",
    "ArchiveMember",
    "BadRowError",
    "BadRows",
    "EventRules",
    "InteractionColumns",
    "Interactions",
    "ItemTexts",
    "Layout",
    "Row",
    "UnknownItems",
    "archive_members",
    "column_types",
    "layout_of",
    "read_interactions",
    "read_items",
    "read_rows",
]
