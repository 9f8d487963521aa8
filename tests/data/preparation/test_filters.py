"""Filters: every drop is counted by its reason, and each agrees with a plain loop."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laser_fast.data import PrepareRequest, prepare
from laser_fast.data.text import first_words
from laser_fast.data.time_units import parse_time

from ..preparing import items_of_users

LOG = [("u", "a", 5), ("u", "b", 1), ("v", "a", 2), ("u", "a", 3), ("u", "c", 5), ("v", "b", 9), ("w", "c", 4)]


@pytest.fixture
def request_(tmp_path: Path) -> PrepareRequest:
    rows = "".join(f"{user},{item},{time}\n" for user, item, time in LOG)
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + rows)
    return PrepareRequest(tmp_path / "out", interactions=tmp_path / "log.csv")


def outcome(request: PrepareRequest) -> tuple[dict[str, str], dict[str, int]]:
    dataset = prepare(request)
    dropped = {name: count for name, count in dataset.manifest.counts.items() if name.startswith("dropped_") and count}
    return {user: "".join(items) for user, items in items_of_users(dataset).items()}, dropped


@pytest.mark.parametrize(
    "change, sequences, dropped",
    [
        ({}, {"u": "baac", "v": "ab", "w": "c"}, {}),
        ({"from_time": "2", "to_time": "5"}, {"v": "a", "u": "a", "w": "c"}, {"dropped_outside_window": 4}),
        ({"duplicates": "first"}, {"u": "bac", "v": "ab", "w": "c"}, {"dropped_duplicate": 1}),
        ({"max_history": 2}, {"u": "ac", "v": "ab", "w": "c"}, {"dropped_beyond_max_history": 2}),
        ({"min_history": 2}, {"u": "baac", "v": "ab"}, {"dropped_short_history": 1}),
        (
            {"duplicates": "last", "min_user_interactions": 2, "max_history": 2, "min_history": 2},
            {"u": "ac", "v": "ab"},
            {"dropped_duplicate": 1, "dropped_core": 1, "dropped_beyond_max_history": 1},
        ),
    ],
)
def test_by_hand(
    request_: PrepareRequest, change: dict[str, str], sequences: dict[str, str], dropped: dict[str, int]
) -> None:
    request = replace(request_, **change)  # type: ignore[arg-type]
    assert outcome(request) == (sequences, dropped)
    filters = prepare(request).manifest.filters
    assert {name: filters[name] for name in change if name not in ("from_time", "to_time")} == {
        name: value for name, value in change.items() if name not in ("from_time", "to_time")
    }
    assert ("from_time" in filters, "max_history" in filters) == ("from_time" in change, "max_history" in change)


def test_dates_are_times_in_the_unit_of_the_log(request_: PrepareRequest) -> None:
    assert parse_time("2018-01-01") == 1514764800
    assert parse_time("2018-01-01T01:00:00+01:00", "ms") == 1514764800000
    assert parse_time("2018-01-01T00:00:00.5Z") == 1514764800.5
    assert parse_time("-12") == -12 and parse_time("1e3") == 1000
    for text in ("nan", "2018-13-01", ""):
        with pytest.raises(ValueError, match="a time must be a number or a date"):
            parse_time(text)
    window = replace(request_, to_time="1970-01-01T00:00:02", time_unit="s")
    assert outcome(window)[0] == {"u": "b"}
    # two seconds are 2000 ms, later than everything in this log
    assert len(outcome(replace(window, out=request_.out.with_name("ms"), time_unit="ms"))[0]) == 3


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("rule", ["file-order", "hash:3"])
def test_duplicates_and_newest_agree_with_a_plain_loop(tmp_path: Path, keep: str, rule: str) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"u{rng.integers(20)}", f"i{rng.integers(9)}", int(rng.integers(40))) for _ in range(600)]
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    request = PrepareRequest(tmp_path / "all", interactions=tmp_path / "log.csv", tie_rule=rule)
    whole = items_of_users(prepare(request))
    filtered = replace(request, out=tmp_path / "some", duplicates=keep, max_history=5)  # type: ignore[arg-type]
    expected = {}
    for user, items in whole.items():
        ordered = items if keep == "first" else items[::-1]
        kept = list(dict.fromkeys(ordered))
        expected[user] = (kept if keep == "first" else kept[::-1])[-5:]
    assert items_of_users(prepare(filtered)) == expected


def test_texts_are_cut_after_words(request_: PrepareRequest) -> None:
    assert first_words("one two  three", 3) == "one two  three"
    assert first_words(" one two  three ", 2) == "one two"
    assert first_words("", 1) == ""
    items = request_.out.with_name("items.csv")
    items.write_text("item_id,title\na,<b>Big</b> &amp; small\nb,B\nc,\n")
    dataset = prepare(replace(request_, items=items, text_max_words=2))
    assert dataset.items.fields == {"title": ["Big &", "B", ""]}
