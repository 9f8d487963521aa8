"""Filters over the events of a whole log: duplicates, k-core, length of the histories; each counts what it drops."""

from dataclasses import replace
from typing import Literal

import numpy as np

from laser_fast.data.order import chronological_order, core_mask, tie_keys
from laser_fast.data.readers import Interactions


def select(events: Interactions, keep: np.ndarray, reason: str) -> Interactions:
    """The events where `keep` (bool [n]) holds; the others are counted as `reason`."""
    return replace(
        events,
        user_index=events.user_index[keep],
        item_index=events.item_index[keep],
        timestamps=events.timestamps[keep],
        dropped={**events.dropped, reason: int((~keep).sum())},
    )


def order_of(events: Interactions, seed: int | None) -> np.ndarray:
    """Positions of the events by user and time, ties by the hash with `seed` or in the order of the file; int64 [n]."""
    ids = (events.user_ids, events.item_ids, events.user_index, events.item_index)
    return chronological_order(events.user_index, events.timestamps, None if seed is None else tie_keys(*ids, seed))


def without_duplicates(events: Interactions, keep: Literal["first", "last"], seed: int | None) -> Interactions:
    """One event for each user and item: the first or the last in time; `seed` as in `order_of`."""
    order = order_of(events, seed)
    if keep == "last":
        order = order[::-1]
    pairs = events.user_index[order] * max(len(events.item_ids), 1) + events.item_index[order]
    kept = np.zeros(len(order), dtype=bool)
    kept[order[np.unique(pairs, return_index=True)[1]]] = True
    return select(events, kept, "duplicate")


def core(events: Interactions, min_user: int, min_item: int) -> Interactions:
    """See `core_mask`."""
    return select(events, core_mask(events.user_index, events.item_index, min_user, min_item), "core")


def newest(events: Interactions, longest: int, seed: int | None) -> Interactions:
    """The newest `longest` events of every user; `seed` as in `order_of`."""
    order = order_of(events, seed)
    users = events.user_index[order]
    ends = np.searchsorted(users, users, side="right")
    kept = np.zeros(len(order), dtype=bool)
    kept[order[ends - np.arange(len(order)) <= longest]] = True
    return select(events, kept, "beyond_max_history")


def long_enough(events: Interactions, shortest: int) -> Interactions:
    """The events of users with at least `shortest` of them."""
    counts = np.bincount(events.user_index, minlength=len(events.user_ids))
    return select(events, counts[events.user_index] >= shortest, "short_history")
