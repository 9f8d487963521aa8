"""`prepare` writes the same bytes whatever fits into memory, and what a plain loop over lists makes."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_fast.data import PrepareRequest, pieces, prepare
from laser_fast.data.readers.interactions import InteractionColumns, scan_interactions
from laser_fast.files import atomic

from ..preparing import items_of_users

Event = tuple[int, int, float]  # user, item, time


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def choices(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "tie_rule": ["file-order", "hash:3"][rng.integers(2)],
        "duplicates": ["all", "first", "last"][rng.integers(3)],
        "min_user_interactions": [1, 3][rng.integers(2)],
        "min_item_interactions": [1, 4][rng.integers(2)],
        "max_history": [None, 4][rng.integers(2)],
        "min_history": [1, 2][rng.integers(2)],
        "catalogue": ["all", "interacted"][rng.integers(2)],
    }


def draw(path: Path, rng: np.random.Generator) -> list[Event]:
    """A log full of ties and duplicates, of a kind of times that changes in its midst."""
    count, half = int(rng.integers(100, 200)), bool(rng.integers(2))
    events = [
        (int(rng.integers(12)), int(rng.integers(15)), int(rng.integers(9)) + 0.5 * (half and event > 60))
        for event in range(count)
    ]
    rows = [f"u{user},i{item},{time if time % 1 else int(time)}\n" for user, item, time in events]
    path.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    return events


def core(events: list[Event], min_user: int, min_item: int) -> list[Event]:
    while True:
        users, items = Counter(event[0] for event in events), Counter(event[1] for event in events)
        left = [event for event in events if users[event[0]] >= min_user and items[event[1]] >= min_item]
        if len(left) == len(events):
            return left
        events = left


def expected(events: list[Event], settings: dict[str, Any]) -> dict[str, list[str]]:
    """Items of every user after all filters but that of duplicates, ties in the order of the file."""
    ordered = sorted(events, key=lambda event: event[2])
    ordered = core(ordered, settings["min_user_interactions"], settings["min_item_interactions"])
    found: dict[str, list[str]] = {}
    for user, item, _ in ordered:
        found.setdefault(f"u{user}", []).append(f"i{item}")
    found = {user: items[-(settings["max_history"] or 1000) :] for user, items in found.items()}
    return {user: items for user, items in found.items() if len(items) >= settings["min_history"]}


def test_small_buffers_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, compared = np.random.default_rng(0), 0
    for case in range(8):
        events, settings = draw(tmp_path / "log.csv", rng), choices(rng)
        if by_hand := case % 2 == 0:
            settings |= {"tie_rule": "file-order", "duplicates": "all"}
        request = PrepareRequest(tmp_path / "out", interactions=tmp_path / "log.csv", overwrite=True, **settings)
        monkeypatch.undo()
        monkeypatch.setattr(atomic, "sync", lambda path: None)
        if not core(events, settings["min_user_interactions"], settings["min_item_interactions"]):
            continue
        dataset = prepare(request)
        if by_hand:
            assert items_of_users(dataset) == expected(events, settings), settings
            compared += 1
        whole = written(request.out)
        for buffer in (1, 11):
            monkeypatch.setattr(pieces, "PIECE", buffer + 1)
            out = tmp_path / f"{case}-{buffer}"
            prepare(replace(request, out=out), buffer_events=buffer)
            assert written(out) == whole, (settings, buffer)
    assert compared > 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_no_more_events_are_handed_on_at_once_than_fit(tmp_path: Path) -> None:
    events = draw(tmp_path / "log.csv", np.random.default_rng(1))
    sizes: list[int] = []
    ids = scan_interactions(
        tmp_path / "log.csv", InteractionColumns(), None, lambda part: sizes.append(len(part)), buffer_events=7
    )
    assert (max(sizes), sum(sizes)) == (7, len(events))
    assert len(ids.user_ids) == len({event[0] for event in events})


def test_a_failed_run_leaves_no_events_behind(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "u,i,1\n" * 9 + "u,i,late\n")
    with pytest.raises(ValueError, match="must be a finite number, got 'late' in line 11"):
        prepare(PrepareRequest(tmp_path / "out", interactions=tmp_path / "log.csv"), buffer_events=2)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
