"""Reading the interaction log: flat arrays that grow with the events, nothing else."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from laser_fast.data.readers.rows import read_rows
from laser_fast.data.readers.values import parse_id, parse_number

UnknownItems = Literal["error", "drop", "keep"]
_EXACT_FLOAT = 2**53  # float64 holds every whole number up to here


@dataclass(frozen=True, eq=False)
class Interactions:
    """Events in the order of the file.

    Args:
        user_ids: external ids in order of first appearance.
        item_ids: external ids of the catalogue, then those the log added ("keep", or no catalogue).
        user_index: [n], int64 into `user_ids`.
        item_index: [n], int64 into `item_ids`.
        timestamps: [n], int64 if all are whole numbers, else float64.
        dropped: events left out, by reason.
    """

    user_ids: list[str]
    item_ids: list[str]
    user_index: np.ndarray
    item_index: np.ndarray
    timestamps: np.ndarray
    dropped: dict[str, int]


@dataclass(frozen=True)
class InteractionColumns:
    """Names of the columns of an interaction log; `rating` is read only where a lowest rating is asked for."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    rating: str = "rating"


def _times(values: array) -> np.ndarray:  # type: ignore[type-arg]  # array has no runtime subscript before 3.12
    if values.typecode == "q":
        return np.frombuffer(values, dtype=np.int64) if len(values) else np.zeros(0, dtype=np.int64)
    times = np.frombuffer(values, dtype=np.float64)
    if (np.abs(times) <= _EXACT_FLOAT).all() and (times == np.floor(times)).all():
        return times.astype(np.int64)  # "978300760.0" is a whole number too
    return times


def read_interactions(
    path: Path,
    columns: InteractionColumns,
    catalogue: Sequence[str] | None,
    *,
    unknown_items: UnknownItems = "error",
    min_rating: float | None = None,
) -> Interactions:
    """All events of a log.

    Args:
        path: the log.
        columns: names of its columns.
        catalogue: external ids of the items in index order; None takes the items of the log, by first appearance.
        unknown_items: an event with an item outside the catalogue raises ("error"), is left out ("drop"), or adds the
            item ("keep").
        min_rating: leave out events rated lower.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a value is bad or an item unknown; with the line number.
    """
    users: dict[str, int] = {}
    items: dict[str, int] = {item: index for index, item in enumerate(catalogue or ())}
    growing = catalogue is None or unknown_items == "keep"
    user_index, item_index = array("q"), array("q")
    times: array = array("q")  # type: ignore[type-arg]
    dropped = {"low_rating": 0, "unknown_item": 0}
    names = [columns.user, columns.item, columns.time] + ([columns.rating] if min_rating is not None else [])
    for row in read_rows(path, names):
        user = parse_id(row, columns.user, row.values[0])
        item = parse_id(row, columns.item, row.values[1])
        time = parse_number(row, columns.time, row.values[2])
        if min_rating is not None and parse_number(row, columns.rating, row.values[3]) < min_rating:
            dropped["low_rating"] += 1
            continue
        if item not in items:
            if growing:
                items[item] = len(items)
            elif unknown_items == "drop":
                dropped["unknown_item"] += 1
                continue
            else:
                raise row.error("the item must be in the item file (or choose to drop or keep)", columns.item, item)
        if isinstance(time, float) and times.typecode == "q":
            times = array("d", times)
        times.append(time)
        user_index.append(users.setdefault(user, len(users)))
        item_index.append(items[item])
    return Interactions(
        user_ids=list(users),
        item_ids=list(items),
        user_index=np.array(user_index, dtype=np.int64),
        item_index=np.array(item_index, dtype=np.int64),
        timestamps=_times(times),
        dropped=dropped,
    )
