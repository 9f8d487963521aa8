"""Order of the events, and the filters that look at more than one of them: duplicates, k-core, length of the histories.

Each function takes the events of whole users (records of `event_type`); all but `by_user_and_time` expect them in its
order, which dropping events leaves as it is.
"""

from typing import Literal

import numpy as np

from laser_fast.data.preparation.event_blocks import EventBlocks
from laser_fast.data.preparation.order import TieKeys, chronological_order


def by_user_and_time(events: np.ndarray, keys: TieKeys | None) -> np.ndarray:
    """The events by user and time, ties by `keys` or, without, as they stand."""
    users, items = events["user"], events["item"]
    return events[chronological_order(users, events["time"], None if keys is None else keys(users, items))]


def not_duplicate(events: np.ndarray, keep: Literal["first", "last"]) -> np.ndarray:
    """One event for each user and item, the first or the last in time: bool [n]."""
    step = 1 if keep == "first" else -1
    pairs = (events["user"].astype(np.int64) << 32) | events["item"]
    kept = np.zeros(len(events), dtype=bool)
    kept[::step][np.unique(pairs[::step], return_index=True)[1]] = True
    return kept


def newest(events: np.ndarray, longest: int) -> np.ndarray:
    """The newest `longest` events of every user: bool [n]."""
    users = np.ascontiguousarray(events["user"])
    ends = np.searchsorted(users, users, side="right")
    return np.asarray(ends - np.arange(len(users)) <= longest)


def long_enough(events: np.ndarray, shortest: int) -> np.ndarray:
    """The events of users with at least `shortest` of them: bool [n]."""
    _, user, counts = np.unique(events["user"], return_inverse=True, return_counts=True)
    return np.asarray(counts[user] >= shortest)


def keep_core(events: EventBlocks, num_items: int, min_user: int, min_item: int) -> int:
    """Drop users with fewer than `min_user` and items with fewer than `min_item` events; returns how many events.

    Repeated until nothing more falls away (the k-core for `min_user = min_item = k`). In memory are the counts of users
    and items; the blocks are read once for every repetition.
    """
    if min_user <= 1 and min_item <= 1:
        return 0
    users, items = np.ones(int(events.bounds[-1]), dtype=bool), np.ones(num_items, dtype=bool)

    def alive(block: np.ndarray) -> np.ndarray:
        return np.asarray(users[block["user"]] & items[block["item"]])

    before, left = (-1, -1), (len(users), len(items))
    while before != left:
        before = left
        per_user, per_item = np.zeros(len(users), dtype=np.int64), np.zeros(num_items, dtype=np.int64)
        for block, first, end in zip(events, events.bounds[:-1], events.bounds[1:], strict=True):
            kept = block[alive(block)]
            per_user[first:end] += np.bincount(kept["user"] - first, minlength=end - first)
            per_item += np.bincount(kept["item"], minlength=num_items)
        users &= per_user >= min_user
        items &= per_item >= min_item
        left = (int(users.sum()), int(items.sum()))
    return events.keep(alive)
