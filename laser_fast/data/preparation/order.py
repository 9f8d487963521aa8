"""Order of events: chronological per user, ties by a stated rule, after the filters.

Whole-second timestamps tie often (MovieLens-100K: for 44% of the users the last two events), so the rule decides what
the held-out items are.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from laser_fast.data.permutation import GOLDEN, split_mix
from laser_fast.data.pieces import pieces

FILE_ORDER = "file-order"
_HASH = "hash:"


def parse_tie_rule(rule: str) -> int | None:
    """Seed of "hash:SEED", None for "file-order".

    Raises:
        ValueError: any other rule.
    """
    if rule == FILE_ORDER:
        return None
    seed = rule.removeprefix(_HASH)
    if rule.startswith(_HASH) and seed.isdecimal() and seed.isascii() and int(seed) < 2**63:
        return int(seed)
    raise ValueError(f"parse_tie_rule: the tie rule must be {FILE_ORDER!r} or 'hash:SEED', got {rule!r}")


def _string_hashes(strings: Sequence[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(string.encode("utf-8"), digest_size=8).digest() for string in strings)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


class TieKeys:
    """A hash of (seed, user id, item id) for every event: the same on every machine and in any file order.

    Args:
        user_ids, item_ids: external ids, into which the indices of events point.
        seed: of the tie rule.
    """

    def __init__(self, user_ids: Sequence[str], item_ids: Sequence[str], seed: int) -> None:
        users, items = _string_hashes(user_ids), _string_hashes(item_ids)
        self._users = split_mix(users ^ split_mix(np.full(1, seed, dtype=np.uint64) + GOLDEN))
        self._items = split_mix(items)

    def __call__(self, user_index: np.ndarray, item_index: np.ndarray) -> np.ndarray:
        """Keys of events, uint64 [n]."""
        return split_mix(self._users[user_index] ^ self._items[item_index])


def chronological_order(user_index: np.ndarray, timestamps: np.ndarray, keys: np.ndarray | None) -> np.ndarray:
    """Positions of the events, grouped by user, oldest first; ties by `keys`, then by position. int64 [n]."""
    # lexsort is stable, so what is left equal stays in the order of the file
    columns = (timestamps, user_index) if keys is None else (keys, timestamps, user_index)
    return np.lexsort(columns).astype(np.int64)


def tie_counts(offsets: np.ndarray, timestamps: np.ndarray) -> dict[str, int]:
    """How much the tie rule decides: events that share their time with another event of the same user, and users
    whose last two events do. Timestamps are sorted per user."""
    firsts, ends = offsets[:-1], offsets[1:][np.diff(offsets) >= 2]
    tied = last_two = 0
    before = timestamps[:0]  # the last time of the piece before
    counted = False  # whether that event is among the tied
    for start, piece in pieces(timestamps):
        joined = np.concatenate([before, piece])
        first = start - len(before)  # event of joined[0]
        same = joined[1:] == joined[:-1]  # each event with the one before it
        inside = firsts[np.searchsorted(firsts, first, side="right") : np.searchsorted(firsts, start + len(piece))]
        same[inside - first - 1] = False
        marked = np.zeros(len(joined), dtype=bool)
        marked[1:] |= same
        marked[:-1] |= same
        tied += int(marked.sum()) - int(counted and marked[0])
        counted = bool(marked[-1])
        last = ends[np.searchsorted(ends, first + 2) : np.searchsorted(ends, start + len(piece), side="right")]
        last_two += int(same[last - first - 2].sum())
        before = joined[-1:]
    return {"tied_interactions": tied, "users_with_last_two_tied": last_two}
