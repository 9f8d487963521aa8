"""Events on disk while a data set is made: first in the order of the log, then in blocks of whole users.

In memory are one block, and of every user one integer; on disk 16 bytes an event, twice while the blocks are made.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from laser_fast.data.readers.event_columns import TimeType, event_type
from laser_fast.data.readers.interactions import BUFFER_EVENTS

_EVENT_BYTES = event_type("i8").itemsize


class EventSpill:
    """A file of the events of a log, in its order.

    Args:
        path: where to write it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.write_bytes(b"")
        self._time_type = TimeType()
        self._whole_numbers = 0  # events before the first time that was given as a float
        self._count = 0
        self._per_user = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._count

    def add(self, events: np.ndarray) -> None:
        """Append events; see `TakeEvents`. After times of float64 come no others."""
        self._time_type.add(events["time"])
        self._count += len(events)
        if events["time"].dtype.kind == "i":
            self._whole_numbers = self._count
        counts = np.bincount(events["user"], minlength=len(self._per_user))
        counts[: len(self._per_user)] += self._per_user
        self._per_user = counts
        with self._path.open("ab") as file:
            file.write(events.data)

    def in_blocks(self, path: Path, buffer_events: int = BUFFER_EVENTS) -> "EventBlocks":
        """The same events in a file by blocks of users, within a block in the order of the log; this file is removed.

        Args:
            path: the new file.
            buffer_events: most events of a block, unless it is of a single user, and of what is read at once.
        """
        blocks = EventBlocks(path, _bounds(self._per_user, buffer_events), self._per_user, self._time_type.dtype)
        for start in range(0, self._count, buffer_events):
            blocks.add(self._read(start, min(buffer_events, self._count - start)))
        self._path.unlink()
        return blocks

    def _read(self, start: int, count: int) -> np.ndarray:
        raw = np.fromfile(self._path, event_type("i8"), count, offset=start * _EVENT_BYTES)
        events = np.empty(count, event_type(self._time_type.dtype))
        events["user"], events["item"] = raw["user"], raw["item"]
        whole = min(max(self._whole_numbers - start, 0), count)
        events["time"][:whole] = self._time_type.of(raw["time"][:whole])
        events["time"][whole:] = self._time_type.of(raw["time"][whole:].view("<f8"))
        return events


def _bounds(per_user: np.ndarray, buffer_events: int) -> np.ndarray:
    """First user of every block, and the number of users."""
    ends = np.cumsum(per_user)
    bounds = [0]
    while bounds[-1] < len(ends):
        before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(ends, before + buffer_events, side="right"))))
    return np.array(bounds, dtype=np.int64)


class EventBlocks:
    """Events in blocks of users that follow each other, each block at a place of its own in one file.

    Args:
        path: the file.
        bounds: [K+1], int64, first user of every block, and the number of users.
        per_user: [U], int64, most events of every user.
        time_type: of the times.

    Attributes:
        bounds: as above.
    """

    def __init__(self, path: Path, bounds: np.ndarray, per_user: np.ndarray, time_type: np.dtype) -> None:
        self.bounds = bounds
        self.time_type = time_type
        self._path = path
        self._path.write_bytes(b"")
        places = np.zeros(len(per_user) + 1, dtype=np.int64)
        np.cumsum(per_user, out=places[1:])
        self._places = places[bounds]
        self._counts = np.zeros(len(bounds) - 1, dtype=np.int64)

    def __len__(self) -> int:
        """How many events there are in all blocks."""
        return int(self._counts.sum())

    def __iter__(self) -> Iterator[np.ndarray]:
        """The events of every block."""
        return (self._read(block) for block in range(len(self._counts)))

    def add(self, events: np.ndarray) -> None:
        """Append events of any users to their blocks."""
        block_of = np.searchsorted(self.bounds, events["user"], side="right") - 1
        grouped = events[np.argsort(block_of, kind="stable")]
        ends = np.cumsum(np.bincount(block_of, minlength=len(self._counts)))
        for block in np.unique(block_of):
            start = int(ends[block - 1]) if block else 0
            self._write(int(block), int(self._counts[block]), grouped[start : ends[block]])

    def transform(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Replace the events of every block by `change` of them: as many or fewer, of the same users."""
        for block in range(len(self._counts)):
            before = self._read(block)
            after = change(before)
            if after is not before:
                self._write(block, 0, after)

    def keep(self, choose: Callable[[np.ndarray], np.ndarray]) -> int:
        """Drop the events for which `choose` of a block (bool [n]) does not hold; returns how many."""

        def chosen(events: np.ndarray) -> np.ndarray:
            kept = choose(events)
            return events if kept.all() else events[kept]

        before = len(self)
        self.transform(chosen)
        return before - len(self)

    def _read(self, block: int) -> np.ndarray:
        offset = int(self._places[block]) * _EVENT_BYTES
        return np.fromfile(self._path, event_type(self.time_type), int(self._counts[block]), offset=offset)

    def _write(self, block: int, position: int, events: np.ndarray) -> None:
        with self._path.open("r+b") as file:
            file.seek((int(self._places[block]) + position) * _EVENT_BYTES)
            file.write(events.data)
        self._counts[block] = position + len(events)
