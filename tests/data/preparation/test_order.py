"""Order of events, tie rules and filters."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from laser_fast.data import pieces
from laser_fast.data.preparation.order import TieKeys, chronological_order, parse_tie_rule, tie_counts


def test_order_by_user_then_time_then_position() -> None:
    users = np.array([1, 0, 1, 0, 1, 0])
    times = np.array([5, 9, 5, 2, 1, 2])
    assert chronological_order(users, times, None).tolist() == [3, 5, 1, 4, 0, 2]


def test_hash_keys_order_only_what_ties() -> None:
    users, times = np.zeros(4, dtype=np.int64), np.array([3, 1, 1, 0])
    keys = np.array([0, 7, 2, 9], dtype=np.uint64)
    assert chronological_order(users, times, keys).tolist() == [3, 2, 1, 0]


def test_equal_times_beyond_float_precision_are_not_mixed_up() -> None:
    times = np.array([2**53 + 1, 2**53], dtype=np.int64)
    assert chronological_order(np.zeros(2, dtype=np.int64), times, None).tolist() == [1, 0]


def test_tie_keys_depend_on_ids_and_seed_not_on_file_order() -> None:
    user_ids, item_ids = ["u", "v"], ["a", "b", "c"]
    users, items = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 2])
    keys = TieKeys(user_ids, item_ids, 1)(users, items)
    swapped = TieKeys(user_ids[::-1], item_ids[::-1], 1)(1 - users, 2 - items)
    assert keys.tolist() == swapped.tolist()
    assert len(set(keys.tolist())) == 4
    assert not set(keys.tolist()) & set(TieKeys(user_ids, item_ids, 2)(users, items).tolist())


def test_tie_keys_equal_whole_number_arithmetic() -> None:
    """A split must stay the same for good, so the rule is derived a second time, without numpy."""

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    def hashed(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    seed = 2**63 - 1
    expected = [
        mix(mix(hashed(user) ^ mix((seed + 0x9E3779B97F4A7C15) % 2**64)) ^ mix(hashed(item)))
        for user, item in (("u", "a"), ("v", "é"))
    ]
    assert TieKeys(["u", "v"], ["a", "é"], seed)(np.array([0, 1]), np.array([0, 1])).tolist() == expected


def test_tie_keys_do_not_depend_on_the_hash_seed_of_python(in_fresh_python: Callable[..., Any]) -> None:
    code = (
        "import numpy as np; from laser_fast.data.preparation.order import TieKeys; "
        "print(TieKeys(['u'], ['a', 'b'], 5)(np.array([0, 0]), np.array([0, 1])).tolist())"
    )
    here = TieKeys(["u"], ["a", "b"], 5)(np.array([0, 0]), np.array([0, 1])).tolist()
    assert in_fresh_python(code, PYTHONHASHSEED="1").stdout == f"{here}\n"


@pytest.mark.parametrize("rule, seed", [("file-order", None), ("hash:0", 0), ("hash:17", 17)])
def test_tie_rules(rule: str, seed: int | None) -> None:
    assert parse_tie_rule(rule) == seed


@pytest.mark.parametrize("rule", ["hash", "hash:", "hash:-1", "hash:x", "random", "hash:\u0663"])
def test_other_tie_rules_are_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="must be 'file-order' or 'hash:SEED', got"):
        parse_tie_rule(rule)


@pytest.mark.parametrize("piece", [1, 2, 3, 100])
def test_tie_counts_by_hand(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    offsets = np.array([0, 4, 5, 5, 7])
    times = np.array([1, 1, 2, 2, 2, 5, 5])
    # user 0: all four tie, also the last two; user 1 has one event, equal to its neighbour's; user 3: both tie
    assert tie_counts(offsets, times) == {"tied_interactions": 6, "users_with_last_two_tied": 2}
