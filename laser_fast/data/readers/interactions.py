"""Reading the interaction log: in memory are the ids, and as many events as are handed on at once."""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from laser_fast.data.readers.bad_rows import BadRowError, BadRows
from laser_fast.data.readers.event_columns import TimeType, event_type
from laser_fast.data.readers.layouts import Layout
from laser_fast.data.readers.rows import Row, read_rows
from laser_fast.data.readers.streams import Source
from laser_fast.data.readers.values import parse_id, parse_number
from laser_fast.data.time_units import TOLD_TIMES, TimeUnit, time_unit_of

UnknownItems = Literal["error", "drop", "keep"]
BUFFER_EVENTS = 2**19  # 8 MiB of events
TakeEvents = Callable[[np.ndarray], None]
"""Takes events in the order of the log: records of `event_type`, with the times of int64 or float64."""


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
        time_unit: of its times; None: that of the first whose unit can be told. An event with a time that is told to be
            of another unit is a bad row: its place among the others would be wrong.
    """

    unknown_items: UnknownItems = "error"
    min_rating: float | None = None
    from_time: int | float | None = None
    to_time: int | float | None = None
    time_unit: TimeUnit | None = None

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


@dataclass(frozen=True, eq=False)
class LogIds:
    """What of a log is held in memory: `user_ids`, `item_ids` and `dropped` of `Interactions`."""

    user_ids: list[str]
    item_ids: list[str]
    dropped: dict[str, int]


class _Log:
    """The ids so far, and the events that were not handed on yet."""

    def __init__(
        self,
        columns: InteractionColumns,
        catalogue: Sequence[str] | None,
        rules: EventRules,
        take: TakeEvents,
        buffer_events: int,
    ) -> None:
        self.users: dict[str, int] = {}
        self.items: dict[str, int] = {item: index for index, item in enumerate(catalogue or ())}
        self.dropped = {"low_rating": 0, "unknown_item": 0} | ({"outside_window": 0} if rules.has_window else {})
        self._user_index, self._item_index = array("i"), array("i")
        self._times: array = array("q")  # type: ignore[type-arg]  # array has no runtime subscript before 3.12
        self._columns = columns
        self._rules = rules
        self._take = take
        self._buffer_events = buffer_events
        self._growing = catalogue is None or rules.unknown_items == "keep"
        self._lowest = -math.inf if rules.from_time is None else rules.from_time
        self._end = math.inf if rules.to_time is None else rules.to_time
        self._unit = rules.time_unit
        self._of_unit: tuple[float, float] = (math.inf, math.inf) if self._unit is None else TOLD_TIMES[self._unit]

    def add(self, row: Row) -> None:
        """Keep the event or count why it is dropped.

        Raises:
            BadRowError: a value is bad, or the item is unknown and must not be; nothing was kept then.
        """
        columns, rules = self._columns, self._rules
        user, item = row.values[:2]
        if type(user) is not str or user not in self.users:  # what is known was parsed before, into itself
            user = parse_id(row, columns.user, user)
        if type(item) is not str or item not in self.items:
            item = parse_id(row, columns.item, item)
        time = parse_number(row, columns.time, row.values[2])
        if not self._of_unit[0] <= time < self._of_unit[1]:
            self._check_unit(row, time)
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
        if isinstance(time, float) and self._times.typecode == "q":
            self.hand_on()
            self._times = array("d")
        self._times.append(time)
        self._user_index.append(self.users.setdefault(user, len(self.users)))
        self._item_index.append(index)
        if len(self._times) >= self._buffer_events:
            self.hand_on()

    def _check_unit(self, row: Row, time: float) -> None:
        unit = time_unit_of(time)
        if unit is not None and self._unit is not None:
            raise row.error(f"times must be of one unit, here {self._unit}", self._columns.time, time)
        if unit is not None:
            self._unit, self._of_unit = unit, TOLD_TIMES[unit]

    def hand_on(self) -> None:
        """Hand on the events in the buffer, if any."""
        if not self._times:
            return
        events = np.empty(len(self._times), event_type("i8" if self._times.typecode == "q" else "f8"))
        for name, values in (("user", self._user_index), ("item", self._item_index), ("time", self._times)):
            events[name] = values
            del values[:]
        self._take(events)


def told_unit(source: Source, time_column: str, layout: Layout | None = None, *, rows: int = 10_000) -> TimeUnit | None:
    """The unit of the first time of a log of which it can be told, among its first `rows`; see `time_unit_of`.

    Raises:
        FileNotFoundError, ValueError: see `read_rows`.
    """
    for row in islice(read_rows(source, [time_column], layout, BadRows(skip=True, listed=0)), rows):
        try:
            unit = time_unit_of(parse_number(row, time_column, row.values[0]))
        except BadRowError:
            continue
        if unit is not None:
            return unit
    return None


def scan_interactions(
    source: Source,
    columns: InteractionColumns,
    catalogue: Sequence[str] | None,
    take: TakeEvents,
    *,
    rules: EventRules | None = None,
    layout: Layout | None = None,
    bad_rows: BadRows | None = None,
    buffer_events: int = BUFFER_EVENTS,
) -> LogIds:
    """Read a log and hand its events on, at most `buffer_events` at once; beside them only the ids are in memory.

    Args:
        source, columns, catalogue, rules, layout, bad_rows: see `read_interactions`.
        take: takes the events.
        buffer_events: most events handed on at once.

    Raises:
        FileNotFoundError, ValueError: see `read_interactions`.
    """
    rules, bad_rows = rules or EventRules(), bad_rows or BadRows()
    log = _Log(columns, catalogue, rules, take, buffer_events)
    names = [columns.user, columns.item, columns.time] + ([columns.rating] if rules.min_rating is not None else [])
    for row in read_rows(source, names, layout, bad_rows):
        try:
            log.add(row)
        except BadRowError as error:
            bad_rows.add(error)
    log.hand_on()
    return LogIds(list(log.users), list(log.items), log.dropped)


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
    blocks: list[np.ndarray] = []
    ids = scan_interactions(source, columns, catalogue, blocks.append, rules=rules, layout=layout, bad_rows=bad_rows)
    time_type = TimeType()
    for block in blocks:
        time_type.add(block["time"])
    nothing = np.zeros(0, event_type("i8"))
    return Interactions(
        **vars(ids),
        user_index=np.concatenate([block["user"] for block in (nothing, *blocks)]).astype(np.int64),
        item_index=np.concatenate([block["item"] for block in (nothing, *blocks)]).astype(np.int64),
        timestamps=np.concatenate([time_type.of(block["time"]) for block in (nothing, *blocks)], dtype=time_type.dtype),
    )
