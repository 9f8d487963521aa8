"""The external id of each index of a foreign checkpoint, from JSON or CSV."""

import csv
import json
from pathlib import Path
from typing import Any

_COLUMNS = ("index", "item_id")


def read_item_map(path: str | Path) -> dict[int, str]:
    """Index -> external id.

    Args:
        path: a `.json` file with the list of ids by index from 0 (RecBole's
            `list(dataset.field2id_token["item_id"])`, with the padding) or an object from index to id, or a `.csv`
            file with the columns `index` and `item_id`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_item_map: item map must be a file, got {str(path)!r}")
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"read_item_map: item map must be a .json or .csv file, got {path.name!r}")
    name = f"read_item_map: {path.name}"
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _json_rows(name, text) if path.suffix == ".json" else _csv_rows(name, text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8, got {error}") from error
    except (json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{name} must be {path.suffix[1:].upper()}, got {error}") from error
    result: dict[int, str] = {}
    for place, index, external in rows:
        if not index.isascii() or not index.isdigit():
            raise ValueError(f"{name}, {place}: the index must be a whole number, got {index!r}")
        if isinstance(external, bool) or not isinstance(external, str | int):
            raise ValueError(f"{name}, {place}: the item id must be a string or a whole number, got {external!r}")
        if int(index) in result:
            raise ValueError(f"{name}, {place}: every index must stand there once, got {int(index)} again")
        result[int(index)] = str(external)
    return result


def _json_rows(name: str, text: str) -> list[tuple[str, str, Any]]:
    values = json.loads(text)
    if isinstance(values, list):
        return [(f"entry {index}", str(index), value) for index, value in enumerate(values)]
    if isinstance(values, dict):
        return [(f"entry {index!r}", index, value) for index, value in values.items()]
    raise ValueError(f"{name} must be a list or an object, got {type(values).__name__}")


def _csv_rows(name: str, text: str) -> list[tuple[str, str, Any]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    columns = reader.fieldnames or ()
    if not set(_COLUMNS) <= set(columns):
        raise ValueError(f"{name} must have the columns {' and '.join(_COLUMNS)}, got {', '.join(columns) or 'none'}")
    return [(f"line {reader.line_num}", (row["index"] or "").strip(), row["item_id"]) for row in reader]
