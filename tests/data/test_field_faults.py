"""Faults of files from the field: none is passed over in silence, each is named where it stands and costs no more."""

import csv
import datetime
import gzip
import io
import json
import random
import tracemalloc
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laser_fast.data import PrepareRequest, SequenceDataset, global_time, prepare, prepare_presplit
from laser_fast.data.items import ItemTable
from laser_fast.data.readers import BadRowError, delimited, streams, values

from .preparing import items_of_users

HEADER = "user_id,item_id,timestamp"
ROWS = [f"u{user},i{(user + step) % 4},{10 * user + step}" for user in range(5) for step in range(4)]
LOG = "\n".join([HEADER, *ROWS]) + "\n"
ITEMS = "item_id,title\n" + "".join(f"i{item},Title {item}\n" for item in range(4))
MOST_BYTES = 2**18  # instead of 2**24, see `short_rows`


def made(folder: Path, log: str | bytes | pa.Table, items: Any = ITEMS, **options: Any) -> SequenceDataset:
    """The data set of a log and items: text is CSV, lists are JSON lines, tables are Parquet, bytes are a `.csv.gz`."""
    number = len(list(folder.iterdir()))
    files = []
    for role, content in (("log", log), ("items", items)):
        if content is None:
            files.append(None)
            continue
        suffix = {str: "csv", list: "jsonl", bytes: "csv.gz"}.get(type(content), "parquet")
        path = folder / f"{role}{number}.{suffix}"
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            lines = [line if isinstance(line, str) else json.dumps(line) for line in content]
            path.write_bytes((content if isinstance(content, str) else "\n".join(lines)).encode())
        files.append(path)
    said: list[str] = options.pop("said", [])
    return prepare(PrepareRequest(folder / f"out{number}", None, *files, **options), say=said.append)


def bad_counts(dataset: SequenceDataset) -> dict[str, int]:
    return {name: count for name, count in dataset.manifest.counts.items() if name.startswith("bad_")}


@pytest.mark.parametrize("quoted", [False, True], ids=["plain", "all values quoted"])
@pytest.mark.parametrize("damaged", [[0], [7], [19], [3, 4], [2, 9, 18]], ids=str)
def test_an_open_quote_costs_its_row_and_no_other(tmp_path: Path, quoted: bool, damaged: list[int]) -> None:
    rows = [f'"{row}"'.replace(",", '","') for row in ROWS] if quoted else ROWS
    hurt = [row.replace('",', ",", 1) if quoted else row.replace(",", ',"', 1) for row in rows]
    log = [HEADER, *(hurt[number] if number in damaged else row for number, row in enumerate(rows))]
    good = [HEADER, *(row for number, row in enumerate(rows) if number not in damaged)]
    said: list[str] = []
    dataset = made(tmp_path, "\n".join(log), skip_bad_rows=True, said=said)
    assert items_of_users(dataset) == items_of_users(made(tmp_path, "\n".join(good)))
    assert bad_counts(dataset)["bad_rows"] == len(damaged) and "bad_lines" not in bad_counts(dataset)
    for number in damaged:
        assert f"in line {number + 2}\n" in said[0] + "\n"
    with pytest.raises(BadRowError, match=rf"the row must be well-formed, got .* in line {damaged[0] + 2}$"):
        made(tmp_path, "\n".join(log))


def test_a_quote_that_is_open_for_too_many_lines_is_named_where_it_opens(tmp_path: Path) -> None:
    log = f'{HEADER}\nu0,"i0,1\n' + "u1,i1,2\n" * 12_000
    with pytest.raises(ValueError, match=r"got a quote that is open for more than 10,000 lines in line 2$"):
        made(tmp_path, log)
    assert len(made(tmp_path, log, skip_bad_rows=True).item_index) == 12_000


def test_rows_that_a_stray_quote_closes_again_are_counted_as_the_lines_they_are(tmp_path: Path) -> None:
    rows = [*ROWS[:5], 'u9,"i1,1', *ROWS[5:8], 'u9,i2",3', *ROWS[8:]]  # three values: well-formed, and no id
    said: list[str] = []
    dataset = made(tmp_path, "\n".join([HEADER, *rows]), skip_bad_rows=True, said=said)
    assert len(dataset.item_index) == len(ROWS) - 3
    assert bad_counts(dataset) | {"bad_rows": 1, "bad_lines": 5} == bad_counts(dataset)
    assert "skipped 1 bad rows of 5 lines" in said[0]
    assert "an id must be one line, got 'i1,1\\nu1" in said[0] and "in lines 7 to 11, column 'item_id'" in said[0]


def test_a_text_of_several_lines_is_whole_or_not_there(tmp_path: Path) -> None:
    items = b'item_id,title\ni0,"one\ncaf\xe9\nthree"\ni1,"a\r\nb"\n'
    log = f"{HEADER}\nu0,i1,1\n"
    dataset = made(tmp_path, log, gzip.compress(items), skip_bad_rows=True, clean=False)
    assert dataset.items.ids == ["i1"] and dataset.items.fields == {"title": ["a\r\nb"]}
    with pytest.raises(ValueError, match=r"got .*the text must be UTF-8, got byte 0xe9 in line 3 in line 2$"):
        made(tmp_path, log, gzip.compress(items))


def test_quotes_are_read_as_the_csv_module_reads_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices(['"', '""', ",", "\n", "\r\n", "a", " ", "\t", "'"], k=8)) for _ in range(300)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["item_id", "title", "note"])
    writer.writerows([f"i{number}", text, texts[-number]] for number, text in enumerate(texts))
    stream.write('i300,5" pipe,"x"\r\ni301,"", "y"\n')  # quotes inside a value, an empty one, a space before
    read = list(csv.reader(io.StringIO(stream.getvalue(), newline=""), strict=True))[1:]
    dataset = made(tmp_path, LOG, stream.getvalue(), clean=False)
    assert dataset.items.fields["title"] == [row[1] for row in read]
    assert dataset.items.fields["note"] == [row[2] for row in read]


@pytest.mark.parametrize("row", ['i9,"a"x', 'i9,"a" ', "i9,a\rb", 'i9,a\rb,"c"', 'i9,"a""', '"i9,a'])
def test_what_the_csv_module_refuses_is_refused(tmp_path: Path, row: str) -> None:
    with pytest.raises(BadRowError, match=r"items\d\.csv: the row must be well-formed, got .* in line 6$"):
        made(tmp_path, LOG, ITEMS + row)


def test_a_text_may_be_long_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    text = "word " * 100_000
    lines = ('say ""word"" ' * 20 + "\n") * 5_000
    items = ITEMS.replace("Title 2", text).replace("Title 3", f'"{lines}"')
    titles = made(tmp_path, LOG, items, text_max_words=5).items.fields["title"]
    assert titles == ["Title 0", "Title 1", "word word word word word", 'say "word" say "word" say']
    assert csv.field_size_limit() == before


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (delimited, streams, values):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", MOST_BYTES)


@pytest.mark.parametrize("kind", ["csv", "quoted", "jsonl", "parquet"])
def test_a_text_has_a_bound(tmp_path: Path, kind: str, short_rows: None) -> None:
    items: Any = [{"item_id": f"i{item}", "title": "T"} for item in range(4)]
    items[2]["title"] = "x" * (MOST_BYTES + 1)
    if kind == "parquet":
        items = pa.Table.from_pylist(items)
    elif kind != "jsonl":
        quote = '"' if kind == "quoted" else ""
        items = ITEMS.replace("Title 2", f"{quote}{items[2]['title']}{quote}")
    with pytest.raises(ValueError, match=r"must have at most 262,144 (bytes|characters), got .* in (line|row) [34]"):
        made(tmp_path, LOG, items)
    kept = made(tmp_path, LOG, items, skip_bad_rows=True, unknown_items="drop")
    assert kept.items.ids == ["i0", "i1", "i3"] and bad_counts(kept)["bad_rows"] == 1


def test_a_zipped_line_without_end_is_refused_in_little_memory(tmp_path: Path, short_rows: None) -> None:
    member = gzip.compress(b"x" * MOST_BYTES)
    log = gzip.compress(LOG.encode()) + member * 64 + gzip.compress(b"\nu9,i0,9\n")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a line must have at most 262,144 bytes, got more in line 22$"):
            made(tmp_path, log)
        dataset = made(tmp_path, log, skip_bad_rows=True)
        assert tracemalloc.get_traced_memory()[1] < 2**23  # the line has twice as many
    finally:
        tracemalloc.stop()
    assert items_of_users(dataset)["u9"] == ["i0"] and bad_counts(dataset)["bad_rows"] == 1


def test_a_long_text_of_many_parquet_rows_is_in_memory_once(tmp_path: Path) -> None:
    rows, long = 20_000, "x" * 200_000  # 4 GB, if every row had its own
    items = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([long]))
    users = pa.array([f"u{row % 50}" for row in range(rows)])
    log = pa.table({"user_id": users, "item_id": items, "timestamp": list(range(rows))})
    tracemalloc.start()
    try:
        dataset = made(tmp_path, log, None)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert dataset.items.ids == [long] and len(dataset.item_index) == rows
    assert pa.default_memory_pool().max_memory() < 2**30


@pytest.mark.parametrize("scale", [0, 10])
def test_decimals_are_exact(tmp_path: Path, scale: int) -> None:
    def decimals(values: list[int | str]) -> pa.Array:
        return pa.array([Decimal(value) for value in values], pa.decimal128(38, scale))

    ids = [10**17 + number for number in range(3)]
    times = [1_500_000_000_000_000_001, 1_500_000_000_000_000_002, 1_500_000_000_000_000_000]
    log = pa.table({"user_id": decimals([7, 7, 7]), "item_id": decimals(ids), "timestamp": decimals(times)})
    items = pa.table({"item_id": decimals(ids), "price": pa.array([Decimal("9.90")] * 3, pa.decimal128(38, 2))})
    dataset = made(tmp_path, log, items)
    assert dataset.items.ids == [str(number) for number in ids] and dataset.user_ids == ["7"]
    assert items_of_users(dataset) == {"7": [str(ids[2]), str(ids[0]), str(ids[1])]}
    assert dataset.timestamps.tolist() == sorted(times)
    assert dataset.items.fields == {"price": ["9.90"] * 3}


def test_a_decimal_with_a_fraction_is_no_id(tmp_path: Path) -> None:
    log = pa.table({"user_id": pa.array([Decimal("1.50")]), "item_id": ["i0"], "timestamp": [1]})
    with pytest.raises(ValueError, match=r"an id must be text or a whole number, got Decimal\('1.50'\) in row 1"):
        made(tmp_path, log)


def test_a_rating_of_32_bits_is_not_below_itself(tmp_path: Path) -> None:
    ratings = pa.array([4.1, 4.0, 4.2], pa.float32())
    log = pa.table({"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "timestamp": [1, 2, 3], "rating": ratings})
    dataset = made(tmp_path, log, min_rating=4.1)
    assert items_of_users(dataset) == {"u": ["i0", "i2"]}


def test_dates_in_parquet_texts_are_dates(tmp_path: Path) -> None:
    moment = datetime.datetime(1995, 12, 31, 18, 30)
    items = {
        "item_id": ["i0"],
        "day": pa.array([moment.date()]),
        "moment": pa.array([moment], pa.timestamp("ns")),
        "price": pa.array([9.99], pa.float32()),
    }
    fields = made(tmp_path, f"{HEADER}\nu,i0,1\n", pa.table(items)).items.fields
    assert fields == {"day": ["1995-12-31"], "moment": ["1995-12-31 18:30:00"], "price": ["9.99"]}


def test_a_parquet_time_beyond_64_bits_does_not_wrap_around(tmp_path: Path) -> None:
    times = pa.array([10**17], pa.timestamp("ms"))
    with pytest.raises(ValueError, match=r"log\d\.parquet: .* got .*out of bounds timestamp.* after row 0"):
        made(tmp_path, pa.table({"user_id": ["u"], "item_id": ["i0"], "timestamp": times}))


def test_columns_of_one_name_are_an_error_in_every_format(tmp_path: Path) -> None:
    arrays = [pa.array(["u"]), pa.array(["i0"]), pa.array([1]), pa.array([2])]
    table = pa.Table.from_arrays(arrays, names=["user_id", "item_id", "timestamp", "timestamp"])
    for log in (table, f"{HEADER},timestamp\nu,i0,1,2\n"):
        with pytest.raises(ValueError, match="columns must have distinct names, got 'timestamp' twice"):
            made(tmp_path, log)
    lines = [
        '{"user_id": "u", "item_id": "i0", "timestamp": 1, "timestamp": 2}',
        json.dumps(dict(zip(HEADER.split(","), ["v", "i1", 3], strict=True))),
    ]
    with pytest.raises(BadRowError, match="a line must be a JSON object, got the key 'timestamp' twice in line 1"):
        made(tmp_path, lines)
    assert items_of_users(made(tmp_path, lines, skip_bad_rows=True)) == {"v": ["i1"]}


def test_json_lines_have_the_columns_of_all_objects(tmp_path: Path) -> None:
    items = [
        {"item_id": "i0", "title": "T0"},
        {"item_id": "i1", "title": "T1", "brand": "Acme"},
        {"color": "red", "item_id": "i2", "brand": "Best"},
        {"item_id": "i3"},
    ]
    whole = {"title": ["T0", "T1", "", ""], "brand": ["", "Acme", "Best", ""], "color": ["", "", "red", ""]}
    assert made(tmp_path, LOG, items).items.fields == whole
    some = made(tmp_path, LOG, items, text_columns=("color", "title")).items.fields
    assert some == {"color": whole["color"], "title": whole["title"]}
    with pytest.raises(ValueError, match="unknown column, got 'colour'; available: item_id, title, brand, color"):
        made(tmp_path, LOG, items, text_columns=("colour",))


def test_json_keys_that_are_no_columns_are_refused(tmp_path: Path) -> None:
    items = [{"item_id": f"i{item}", f"key {item}": "x"} for item in range(1_200)]
    with pytest.raises(ValueError, match=r"at most 1,000 different keys, got 1,001 up to line 1000; name the columns"):
        made(tmp_path, LOG, items)
    assert made(tmp_path, LOG, items, text_columns=("key 1100",)).items.fields["key 1100"][1100] == "x"


NULL_WORDS = [
    *["None", "NULL", "null", "\\N", "<NA>", "nan", "NaN", "-nan", "N/A", "#N/A", "NA", "NaT", "undefined"],
    " None ",
]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_a_word_for_a_missing_value_is_no_id(tmp_path: Path, kind: str, column: str) -> None:
    rows = [{"user_id": "u0", "item_id": "i0", "timestamp": 1} | {column: word} for word in NULL_WORDS]
    rows.append({"user_id": "u1", "item_id": "i1", "timestamp": 2})
    log: Any = rows
    if kind == "csv":
        log = "\n".join([HEADER, *(",".join(map(str, row.values())) for row in rows)])
    elif kind == "parquet":
        log = pa.Table.from_pylist(rows)
    said: list[str] = []
    dataset = made(tmp_path, log, None, skip_bad_rows=True, said=said)
    assert items_of_users(dataset) == {"u1": ["i1"]} and bad_counts(dataset)["bad_rows"] == len(NULL_WORDS)
    assert all(f"got {word!r} in " in said[0] for word in NULL_WORDS)
    with pytest.raises(BadRowError, match=rf"got 'None' in .*, column '{column}'; leave such rows out"):
        made(tmp_path, log, None)


def test_words_that_only_look_missing_are_ids_and_texts_keep_them(tmp_path: Path) -> None:
    names = ["na", "Nano", "nonesuch", "nulled", "0", "-"]
    log = HEADER + "\n" + "".join(f"{name},i0,1\n" for name in names)
    dataset = made(tmp_path, log, "item_id,title,brand\ni0,None,\ni1,NULL,N/A\n")
    assert dataset.user_ids == names
    assert dataset.items.fields == {"title": ["None", "NULL"], "brand": ["", "N/A"]}
    items = [{"item_id": "i0", "title": None}, {"item_id": "i1", "title": "None"}, {"item_id": "i2"}]
    assert made(tmp_path, log, items).items.fields == {"title": ["", "None", ""]}


def test_a_missing_item_in_an_item_file_or_in_rows_that_came_split(tmp_path: Path) -> None:
    with pytest.raises(BadRowError, match=r"items\d\.csv: an id must be .*, got 'NULL' in line 6, column 'item_id'"):
        made(tmp_path, LOG, ITEMS + "NULL,x\n")
    folder = tmp_path / "split"
    folder.mkdir()
    (folder / "items.csv").write_text(ITEMS)
    rows = [("u", ["i0"], "i1"), ("None", ["i0"], "i1"), ("v", ["None"], "i1"), ("w", ["i0"], "nan")]
    lines = [json.dumps({"user": user, "history": history, "target": target}) for user, history, target in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadRowError, match="got 'None' in line 2, column 'user'; leave such rows out"):
        prepare_presplit(folder, tmp_path / "out")
    assert prepare_presplit(folder, tmp_path / "out", skip_bad_rows=True).user_ids == ["u"]


UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
START = 1_500_076_800  # 2017-07-15
DAY = 86_400


def daily(per_second: int, *more: str) -> str:
    rows = [f"u{day // 4},i{day % 4},{(START + day * DAY) * per_second}" for day in range(20)]
    return "\n".join([HEADER, *rows, *more]) + "\n"


@pytest.mark.parametrize("unit", UNITS)
def test_dates_are_dates_in_every_unit(tmp_path: Path, unit: Any) -> None:
    log, said = daily(UNITS[unit]), []
    window = {"from_time": "2017-07-20", "to_time": "2017-07-30T00:00:00+00:00"}
    dataset = made(tmp_path, log, **window, said=said)
    assert len(dataset.item_index) == 10
    assert dataset.timestamps[[0, -1]].tolist() == [(START + day * DAY) * UNITS[unit] for day in (5, 14)]
    assert dataset.manifest.filters["time_unit"] == unit
    assert (
        f"the times of the log are taken for {unit}: from_time {(START + 5 * DAY) * UNITS[unit]}, to_time" in said[-1]
    )
    assert items_of_users(made(tmp_path, log, **window, time_unit=unit)) == items_of_users(dataset)
    split = global_time(made(tmp_path, log), valid_from="2017-07-20", test_from="2017-07-30")
    assert (len(split.train.items), len(split.valid), len(split.test)) == (5, 3, 2)
    assert f"validation from {(START + 5 * DAY) * UNITS[unit]}" in split.rule


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"from_time": "2017-07-20", "time_unit": "s"},
            r"log\d\.csv must be in s, got times in ms; say --time-unit ms",
        ),
        (
            {"from_time": "1500000000"},
            "the time window must be in ms like the times of .*, got 1500000000; give a date",
        ),
        ({"to_time": "20170720"}, "the time window must be in ms like the times of .*, got 20170720; give a date"),
        ({"from_time": "2017-07-20", "to_time": "1"}, "the time window must be in ms .*, got 1; give a date"),
    ],
)
def test_a_window_in_another_unit_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"prepare: .*{message}"):
        made(tmp_path, daily(1000), **options)


def test_a_window_may_name_one_end_as_a_number(tmp_path: Path) -> None:
    window = {"from_time": "2017-07-20", "to_time": str((START + 10 * DAY) * 1000)}
    assert len(made(tmp_path, daily(1000), **window).item_index) == 5
    with pytest.raises(ValueError, match="from_time must lie before to_time"):
        made(tmp_path, daily(1000), from_time="2018-07-20", to_time=window["to_time"])


def test_dates_for_times_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 2017-07-20 and log\d.csv without dates from 1990 .*; say --time-unit"):
        made(tmp_path, LOG, from_time="2017-07-20")
    assert len(made(tmp_path, LOG, from_time="1970-01-01T00:00:40", time_unit="s").item_index) == 4
    assert len(made(tmp_path, LOG, from_time="40").item_index) == 4
    with pytest.raises(
        ValueError, match=r"valid_from can be a date .*, got '2017-07-20' and .* no such unit; give a num"
    ):
        global_time(made(tmp_path, LOG), valid_from="2017-07-20", test_from="2017-07-30")


def test_mixed_units_in_one_log_are_refused(tmp_path: Path) -> None:
    log = daily(1, f"u0,i0,{START * 1000}", "u0,i1,0")  # a time of 0 tells no unit
    with pytest.raises(BadRowError, match=rf"times must be of one unit, here s, got {START * 1000} in line 22, column"):
        made(tmp_path, log)
    dataset = made(tmp_path, log, skip_bad_rows=True)
    assert len(dataset.item_index) == 21 and bad_counts(dataset)["bad_rows"] == 1
    mixed = replace(
        SequenceDataset.from_lists([[0, 1, 2]], ItemTable(["a", "b", "c"], {}), ["u"]),
        timestamps=np.array([START, START + DAY, START * 1000]),
    )
    with pytest.raises(ValueError, match="a log with times in s and ms; give a number"):
        global_time(mixed, valid_from="2017-07-16", test_from="2017-07-17")
