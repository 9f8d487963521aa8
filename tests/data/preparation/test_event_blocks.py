"""Events on disk: blocks of whole users hold the same events, in the order of the log, whatever fits into memory."""

from pathlib import Path

import numpy as np
import pytest

from laser_fast.data.preparation.event_blocks import EventBlocks, EventSpill
from laser_fast.data.preparation.filters import keep_core
from laser_fast.data.readers.event_columns import event_type


def events_of(users: list[int], items: list[int], times: list[int] | list[float]) -> np.ndarray:
    events = np.empty(len(users), event_type(np.asarray(times).dtype))
    events["user"], events["item"], events["time"] = users, items, times
    return events


def blocks_of(folder: Path, *parts: np.ndarray, buffer: int) -> EventBlocks:
    spill = EventSpill(folder / "log")
    for part in parts:
        spill.add(part)
    assert len(spill) == sum(map(len, parts))
    blocks = spill.in_blocks(folder / "events", buffer)
    assert [path.name for path in folder.iterdir()] == ["events"]
    return blocks


@pytest.mark.parametrize("buffer", [1, 2, 7, 50, 1000])
def test_blocks_hold_whole_users_in_the_order_of_the_log(buffer: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(buffer)
    users = rng.integers(0, 20, 300)
    log = events_of(users.tolist(), rng.integers(0, 9, 300).tolist(), np.arange(300).tolist())
    blocks = blocks_of(tmp_path, log[:100], log[100:], buffer=buffer)
    assert len(blocks) == 300
    joined = np.concatenate(list(blocks))
    assert joined[np.argsort(joined["user"], kind="stable")].tolist() == log[np.argsort(users, kind="stable")].tolist()
    ends = [set(block["user"].tolist()) for block in blocks]
    assert sum(map(len, ends)) == len(set(users.tolist()))  # no user is in two blocks
    assert all(len(block) <= buffer or len(set(block["user"].tolist())) == 1 for block in blocks)


def test_blocks_are_changed_in_place(tmp_path: Path) -> None:
    blocks = blocks_of(tmp_path, events_of([0, 1, 0, 2, 2], [5, 6, 7, 8, 9], [1, 2, 3, 4, 5]), buffer=2)
    blocks.transform(lambda events: events[::-1].copy())
    assert [block["item"].tolist() for block in blocks] == [[7, 5], [6], [9, 8]]
    assert blocks.keep(lambda events: events["item"] != 9) == 1
    assert blocks.keep(lambda events: events["item"] < 7) == 2
    assert [block["item"].tolist() for block in blocks] == [[5], [6], []]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([[1, 2**62], [3]], [1, 2**62, 3]),
        ([[1, 2], [3.0]], [1, 2, 3]),  # a float that is a whole number
        ([[1, 2], [3.5, 4.0]], [1.0, 2.0, 3.5, 4.0]),
        ([[2**53 + 1], [3.0]], [2**53, 3]),  # all times are floats then
        ([[2**54], [3.0]], [2.0**54, 3.0]),
    ],
)
def test_the_whole_log_decides_the_type_of_times(
    parts: list[list[float]], expected: list[float], tmp_path: Path
) -> None:
    made = [events_of([0] * len(times), [0] * len(times), times) for times in parts]
    times = np.concatenate([block["time"] for block in blocks_of(tmp_path, *made, buffer=1)])
    assert times.tolist() == expected
    assert {type(time) for time in times.tolist()} == {type(expected[0])}


def test_no_events_are_no_blocks(tmp_path: Path) -> None:
    blocks = blocks_of(tmp_path, buffer=4)
    assert (len(blocks), list(blocks)) == (0, [])
    assert keep_core(blocks, 0, 2, 2) == 0


def test_the_core_falls_away_repeatedly(tmp_path: Path) -> None:
    # user 2 has one event, so item 2 is left with one, so user 1 is left with one
    log = events_of([0, 0, 1, 1, 2], [0, 0, 0, 2, 2], [0, 1, 2, 3, 4])
    for buffer in (1, 9):
        for lowest, left in (((1, 1), [0, 1, 2, 3, 4]), ((2, 2), [0, 1]), ((9, 1), []), ((1, 3), [0, 1, 2])):
            blocks = blocks_of(tmp_path, log, buffer=buffer)
            assert keep_core(blocks, 3, *lowest) == 5 - len(left)
            assert [time for block in blocks for time in block["time"].tolist()] == left
