"""Units of timestamps since 1970: told by their size, and what a date is in each."""

import math
from datetime import datetime, timedelta, timezone
from typing import Literal

import numpy as np

TimeUnit = Literal["s", "ms", "us", "ns"]
_PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_FIRST, _END = (int(datetime(year, 1, 1, tzinfo=timezone.utc).timestamp()) for year in (1990, 2100))
TOLD = "dates from 1990 to 2099 in s, ms, us or ns"
"""The times whose unit can be told, in words: no number is such a date in two units."""
TOLD_TIMES: dict[TimeUnit, tuple[int, int]] = {
    unit: (_FIRST * per_second, _END * per_second) for unit, per_second in _PER_SECOND.items()
}
"""First time of every unit that is told to be of it, and the one behind the last."""


def time_unit_of(time: float) -> TimeUnit | None:
    """The unit of a time, see `TOLD`; None where it cannot be told: a counter, a far date."""
    return next((unit for unit, (first, end) in TOLD_TIMES.items() if first <= time < end), None)


def units_in(times: np.ndarray) -> list[TimeUnit]:
    """The units that can be told of some of the times: one or none, unless they are mixed."""
    return [unit for unit, (first, end) in TOLD_TIMES.items() if bool(((times >= first) & (times < end)).any())]


def moment_in(moment: datetime, unit: TimeUnit) -> int | float:
    """A moment (in UTC where it names no zone) as a timestamp; whole, and exact, where it can be."""
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    scaled = (moment - _EPOCH) // timedelta(microseconds=1) * _PER_SECOND[unit]
    return scaled // 10**6 if scaled % 10**6 == 0 else scaled / 10**6


def number_in(text: str) -> int | float | None:
    """The finite number that `text` is, or None."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if isinstance(number, int) or math.isfinite(number):
            return number
    return None


def parse_time(text: str, unit: TimeUnit = "s") -> int | float:
    """A moment as a timestamp in `unit` since 1970: a number as it is, or a date ("2015-12-31", "2015-12-31T18:00").

    Dates without a zone are in UTC.

    Raises:
        ValueError: `text` is neither.
    """
    number = number_in(text)
    if number is not None:
        return number
    try:
        return moment_in(datetime.fromisoformat(text.strip()), unit)
    except ValueError as error:
        raise ValueError(f"parse_time: a time must be a number or a date like 2015-12-31, got {text!r}") from error
