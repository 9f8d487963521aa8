"""From a log to the arrays of a data set, in memory that does not grow with the events: read, order, filter, write.

What grows in memory are the ids of the users and one integer for each; beside them there are one block of events
(or those of one user if these are more) and the catalogue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from laser_fast.data.dataset import ARRAY_FILES
from laser_fast.data.manifest import Manifest
from laser_fast.data.preparation.event_blocks import EventBlocks, EventSpill
from laser_fast.data.preparation.filters import by_user_and_time, keep_core, long_enough, newest, not_duplicate
from laser_fast.data.preparation.order import TieKeys, parse_tie_rule
from laser_fast.data.preparation.request import PrepareRequest
from laser_fast.data.preparation.sources import PrepareSources
from laser_fast.data.readers import BadRows, EventRules
from laser_fast.data.readers.interactions import LogIds, scan_interactions


@dataclass(frozen=True, eq=False)
class Log:
    """A log that was read: its ids, and its events on disk."""

    ids: LogIds
    events: EventBlocks


def read_log(
    sources: PrepareSources,
    catalogue: list[str] | None,
    manifest: Manifest,
    bad_rows: BadRows,
    scratch: Path,
    buffer_events: int,
) -> Log:
    """The events that the manifest's filters of single events leave, in files in the folder `scratch`."""
    filters = manifest.filters
    spill = EventSpill(scratch / "log")
    ids = scan_interactions(
        sources.log,
        sources.columns,
        catalogue,
        spill.add,
        rules=EventRules(
            filters["unknown_items"],
            filters["min_rating"],
            filters.get("from_time"),
            filters.get("to_time"),
            filters.get("time_unit"),
        ),
        layout=sources.log_layout,
        bad_rows=bad_rows,
        buffer_events=buffer_events,
    )
    return Log(ids, spill.in_blocks(scratch / "events", buffer_events))


def order_and_filter(log: Log, request: PrepareRequest, ordered: Callable[[int], object]) -> None:
    """Order the events and apply the filters that look at the whole log, as `PrepareRequest` names them.

    Args:
        log: its events are changed on disk, its drops are counted.
        request: which filters.
        ordered: told how many events were just put in order.
    """
    events, dropped = log.events, log.ids.dropped
    seed = parse_tie_rule(request.tie_rule)
    keys = None if seed is None else TieKeys(log.ids.user_ids, log.ids.item_ids, seed)

    def in_order(block: np.ndarray) -> np.ndarray:
        ordered(len(block))
        return by_user_and_time(block, keys)

    events.transform(in_order)
    if (kept := request.duplicates) != "all":
        dropped["duplicate"] = events.keep(lambda block: not_duplicate(block, kept))
    dropped["core"] = keep_core(
        events, len(log.ids.item_ids), request.min_user_interactions, request.min_item_interactions
    )
    if (longest := request.max_history) is not None:
        dropped["beyond_max_history"] = events.keep(lambda block: newest(block, longest))
    if (shortest := request.min_history) > 1:
        dropped["short_history"] = events.keep(lambda block: long_enough(block, shortest))


def events_of(log: Log) -> tuple[np.ndarray, np.ndarray]:
    """How many events there are of every user and of every item of the log: int64 [U] and [I]."""
    per_user = np.zeros(len(log.ids.user_ids), dtype=np.int64)
    per_item = np.zeros(len(log.ids.item_ids), dtype=np.int64)
    bounds = log.events.bounds
    for block, first, end in zip(log.events, bounds[:-1], bounds[1:], strict=True):
        per_user[first:end] = np.bincount(block["user"] - first, minlength=end - first)
        per_item += np.bincount(block["item"], minlength=len(per_item))
    return per_user, per_item


def write_arrays(directory: Path, log: Log, offsets: np.ndarray, renumbered: np.ndarray) -> None:
    """Write `ARRAY_FILES`.

    Args:
        directory: where to.
        log: its events are in order.
        offsets: of the users that are left.
        renumbered: [I], int64, index in the data set of every item of the log that has events.
    """
    np.save(directory / ARRAY_FILES[0], offsets, allow_pickle=False)
    with (directory / ARRAY_FILES[1]).open("wb") as items, (directory / ARRAY_FILES[2]).open("wb") as times:
        _write_header(items, np.dtype(np.int32), len(log.events))
        _write_header(times, log.events.time_type, len(log.events))
        for block in log.events:
            items.write(renumbered[block["item"]].astype("<i4").data)
            times.write(np.ascontiguousarray(block["time"]).data)


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """What `np.save` begins the file of a 1-D array with."""
    header = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
