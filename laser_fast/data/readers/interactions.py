"""Reading the interaction log: flat arrays that grow with the events, nothing else."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from laser_fast.data.readers.bad_rows import BadRowError, BadRows
from laser_fast.data.readers.layouts import Layout
from laser_fast.data.readers.rows import Row, read_rows
from laser_fast.data.readers.streams import Source
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
class EventRules:
    """Which events of a log are kept while it is read.

    Args:
        unknown_items: an event with an item outside the catalogue raises ("error"), is left out ("drop"), or adds the
            item ("keep").
        min_rating: leave out events rated lower.
        from_time, to_time: leave out events before `from_time`, and those at `to_time` or later; in the unit of the
            log.
    """

    unknown_items: UnknownItems = "error"
    min_rating: float | None = None
    from_time: int | float | None = None
    to_time: int | float | None = None

    @property
    def has_window(self) -> bool:
        """Whether the time of an event decides anything."""
        return self.from_time is not None or self.to_time is not None


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


class _Log:
    """The events kept so far."""

    def __init__(self, columns: InteractionColumns, catalogue: Sequence[str] | None, rules: EventRules) -> None:
        self.users: dict[str, int] = {}
        self.items: dict[str, int] = {item: index for index, item in enumerate(catalogue or ())}
        self.user_index, self.item_index = array("q"), array("q")
        self.times: array = array("q")  # type: ignore[type-arg]
        self.dropped = {"low_rating": 0, "unknown_item": 0} | ({"outside_window": 0} if rules.has_window else {})
        self._columns = columns
        self._rules = rules
        self._growing = catalogue is None or rules.unknown_items == "keep"
        self._lowest = -math.inf if rules.from_time is None else rules.from_time
        self._end = math.inf if rules.to_time is None else rules.to_time

    def add(self, row: Row) -> None:
        """Keep the event or count why it is dropped.

        Raises:
            BadRowError: a value is bad, or the item is unknown and must not be; nothing was kept then.
        """
        columns, rules = self._columns, self._rules
        user = parse_id(row, columns.user, row.values[0])
        item = parse_id(row, columns.item, row.values[1])
        time = parse_number(row, columns.time, row.values[2])
        if rules.min_rating is not None and parse_number(row, columns.rating, row.values[3]) < rules.min_rating:
            self.dropped["low_rating"] += 1
            return
        if not self._lowest <= time < self._end:
            self.dropped["outside_window"] += 1
            return
        index = self.items.get(item, -1)
        if index < 0:
            if self._growing:
                index = self.items[item] = len(self.items)
            elif rules.unknown_items == "drop":
                self.dropped["unknown_item"] += 1
                return
            else:
                raise row.error("the item must be in the item file (or choose to drop or keep)", columns.item, item)
        if isinstance(time, float) and self.times.typecode == "q":
            self.times = array("d", self.times)
        self.times.append(time)
        self.user_index.append(self.users.setdefault(user, len(self.users)))
        self.item_index.append(index)


def read_interactions(
    source: Source,
    columns: InteractionColumns,
    catalogue: Sequence[str] | None,
    rules: EventRules | None = None,
    *,
    layout: Layout | None = None,
    bad_rows: BadRows | None = None,
) -> Interactions:
    """All events of a log.

    Args:
        source: the log.
        columns: names of its columns.
        catalogue: external ids of the items in index order; None takes the items of the log, by first appearance.
        rules: which events are kept; None: all, and an item outside the catalogue is an error.
        layout: how rows stand in the log; None: by the ending of its name.
        bad_rows: takes the rows that cannot be used; None raises the first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a value is bad or an item unknown; with the line number.
    """
    rules, bad_rows = rules or EventRules(), bad_rows or BadRows()
    log = _Log(columns, catalogue, rules)
    names = [columns.user, columns.item, columns.time] + ([columns.rating] if rules.min_rating is not None else [])
    for row in read_rows(source, names, layout, bad_rows):
        try:
            log.add(row)
        except BadRowError as error:
            bad_rows.add(error)
    return Interactions(
        user_ids=list(log.users),
        item_ids=list(log.items),
        user_index=np.array(log.user_index, dtype=np.int64),
        item_index=np.array(log.item_index, dtype=np.int64),
        timestamps=_times(log.times),
        dropped=log.dropped,
    )
