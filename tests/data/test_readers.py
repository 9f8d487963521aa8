"""Readers: every format gives the same rows, and a bad row is named by file, line, column and value."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_fast.data.readers import (
    EventRules,
    InteractionColumns,
    column_types,
    read_interactions,
    read_items,
    read_rows,
)

FORMATS = {
    "log.csv": "user_id,item_id,timestamp\nu1,a,3\nu2,b,1\nu1,b,2\n",
    "log.tsv": "user_id\titem_id\ttimestamp\nu1\ta\t3\nu2\tb\t1\nu1\tb\t2\n",
    "log.inter": "user_id:token\titem_id:token\ttimestamp:float\nu1\ta\t3\nu2\tb\t1\nu1\tb\t2\n",
    "log.jsonl": '{"user_id": "u1", "item_id": "a", "timestamp": 3}\n'
    '{"user_id": "u2", "item_id": "b", "timestamp": 1}\n'
    '{"user_id": "u1", "item_id": "b", "timestamp": "2"}\n',
}


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def interactions_of(
    path: Path, catalogue: list[str] | None = None, **rules: Any
) -> tuple[list[str], list[str], list[int], list[int], list[float]]:
    read = read_interactions(path, InteractionColumns(), catalogue, EventRules(**rules))
    return (
        read.user_ids,
        read.item_ids,
        read.user_index.tolist(),
        read.item_index.tolist(),
        read.timestamps.tolist(),
    )


@pytest.mark.parametrize("name", [name + end for name in FORMATS for end in ("", ".gz")])
def test_every_format_gives_the_same_interactions(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, FORMATS[name.removesuffix(".gz")])
    assert interactions_of(path) == (["u1", "u2"], ["a", "b"], [0, 1, 0], [0, 1, 1], [3, 1, 2])


@pytest.mark.parametrize(
    "text",
    ["\ufeff" + FORMATS["log.csv"], FORMATS["log.csv"].replace("\n", "\r\n"), FORMATS["log.csv"] + "\n\n"],
    ids=["byte order mark", "Windows line ends", "blank lines"],
)
def test_usual_variants_of_csv(tmp_path: Path, text: str) -> None:
    assert interactions_of(write(tmp_path / "log.csv", text))[3] == [0, 1, 1]


def test_quotes_commas_and_line_breaks_in_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", 'item_id,title\n1,"Sex, Lies, and ""Videotape"""\n2,"two\nlines"\n3,x\n')
    rows = list(read_rows(path, ["title", "item_id"]))
    assert [row.values for row in rows] == [['Sex, Lies, and "Videotape"', "1"], ["two\nlines", "2"], ["x", "3"]]
    assert [(row.line, row.lines) for row in rows] == [(2, 1), (3, 2), (5, 1)]


def test_recbole_keeps_quotes_as_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.item", 'item_id:token\ttitle:token_seq\n1\t"Crocodile" Dundee, "A"\n')
    assert column_types(path) == {"item_id": "token", "title": "token_seq"}
    assert next(iter(read_rows(path, ["title"]))).values == ['"Crocodile" Dundee, "A"']


@pytest.mark.parametrize(
    "numbers, dtype, expected",
    [
        (["881250949", "5"], np.int64, [881250949, 5]),
        (["978300760.0", "8.8e8"], np.int64, [978300760, 880000000]),
        (["1.5", "2"], np.float64, [1.5, 2.0]),
        ([str(2**53 + 1), "-1"], np.int64, [2**53 + 1, -1]),
    ],
)
def test_timestamps_stay_whole_where_they_are(
    tmp_path: Path, numbers: list[str], dtype: type, expected: list[float]
) -> None:
    rows = "".join(f"u,a,{number}\n" for number in numbers)
    read = read_interactions(
        write(tmp_path / "log.csv", "user_id,item_id,timestamp\n" + rows), InteractionColumns(), None
    )
    assert read.timestamps.dtype == dtype
    assert read.timestamps.tolist() == expected


HEADER = "user_id,item_id,timestamp\nu1,a,1\n"


@pytest.mark.parametrize(
    "row, message",
    [
        (
            "u1,a,yesterday",
            r"log\.csv: the value must be a finite number, got 'yesterday' in line 3, column 'timestamp'",
        ),
        ("u1,a,nan", "must be a finite number, got 'nan' in line 3, column 'timestamp'"),
        ("u1,a,inf", "must be a finite number, got 'inf' in line 3"),
        ("u1,a,", "must be a finite number, got '' in line 3"),
        ("u1,a,1_0", "must be a finite number, got '1_0' in line 3"),
        (f"u1,a,{2**63}", f"must fit into 64 bits, got '{2**63}' in line 3"),
        (",a,1", "an id must be text or a whole number, got '' in line 3, column 'user_id'"),
        (
            "u1,NaN,1",
            "for a missing value, got 'NaN' in line 3, column 'item_id'; leave such rows out ",
        ),
        ("u1,a", "a row must have 3 values, got 2 in line 3"),
        ("u1,a,1,9", "a row must have 3 values, got 4 in line 3"),
        ('u1,"a,1', "the row must be well-formed, got .* in line 3"),
    ],
)
def test_bad_rows_of_csv(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interactions_of(write(tmp_path / "log.csv", f"{HEADER}{row}\n"))


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"user_id": "u"', r"log\.jsonl: a line must be a JSON object, got .* in line 2"),
        ("[1]", "a line must be a JSON object, got list in line 2"),
        ('{"user_id": "u", "timestamp": 1}', "got None in line 2, column 'item_id'"),
        ('{"user_id": true, "item_id": 1, "timestamp": 1}', "got True in line 2, column 'user_id'"),
        ('{"user_id": 1.5, "item_id": 1, "timestamp": 1}', r"got 1\.5 in line 2, column 'user_id'"),
        ('{"user_id": "u", "item_id": NaN, "timestamp": 1}', "got nan in line 2, column 'item_id'"),
        ('{"user_id": "\\ud800", "item_id": 1, "timestamp": 1}', "in line 2, column 'user_id'"),
        ('{"user_id": "u", "item_id": 1, "timestamp": true}', "got True in line 2, column 'timestamp'"),
    ],
)
def test_bad_rows_of_json(tmp_path: Path, row: str, message: str) -> None:
    first = '{"user_id": "u", "item_id": 1, "timestamp": 1}\n'
    with pytest.raises(ValueError, match=message):
        interactions_of(write(tmp_path / "log.jsonl", f"{first}{row}\n"))


def test_missing_columns_list_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user,item_id,timestamp\nu,a,1\n")
    with pytest.raises(
        ValueError, match=r"log\.csv: unknown column, got 'user_id'; available: user, item_id, timestamp"
    ):
        interactions_of(path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("log.csv", "", "must hold a header or a row, got an empty file"),
        ("log.jsonl", "\n\n", "must hold a header or a row, got an empty file"),
        ("log.csv", "user_id,item_id,timestamp\n", "must hold at least one row, got none below the header"),
        ("log.csv", "user_id,user_id,timestamp\nu,a,1\n", "distinct names, got 'user_id' twice"),
        ("log.inter", "user_id\titem_id:token\n", r"declared as name:type .*, got 'user_id' in line 1"),
        ("log.inter", "user_id:string\n", "got 'user_id:string' in line 1"),
        ("log.xlsx", "x", r"must end in \.csv, .* got log\.xlsx"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interactions_of(write(tmp_path / name, text))


def test_bytes_that_are_no_text_or_no_gzip(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", HEADER + "caf\u00e9,a,1\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"log\.csv: the text must be UTF-8, got byte 0xe9 in line 3"):
        interactions_of(path)
    (tmp_path / "log.csv.gz").write_bytes(b"user_id,item_id\n")
    with pytest.raises(ValueError, match=r"log\.csv\.gz: the file must be whole gzip data"):
        interactions_of(tmp_path / "log.csv.gz")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(HEADER.encode())[:-9])
    with pytest.raises(ValueError, match=r"cut\.csv\.gz: the file must be whole gzip data"):
        interactions_of(tmp_path / "cut.csv.gz")


def test_unknown_items(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", HEADER + "u2,x,1\nu1,b,2\n")
    with pytest.raises(ValueError, match=r"must be in the item file .*, got 'x' in line 3, column 'item_id'"):
        interactions_of(path, catalogue=["b", "a"])
    assert interactions_of(path, catalogue=["b", "a"], unknown_items="drop")[:4] == (["u1"], ["b", "a"], [0, 0], [1, 0])
    kept = interactions_of(path, catalogue=["b", "a"], unknown_items="keep")
    assert kept[:4] == (["u1", "u2"], ["b", "a", "x"], [0, 1, 0], [1, 2, 0])
    read = read_interactions(path, InteractionColumns(), ["b", "a"], EventRules("drop"))
    assert read.dropped == {"low_rating": 0, "unknown_item": 1}


def test_lowest_rating(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user_id,item_id,stars,timestamp\nu,a,3.5,1\nu,b,4,2\nv,a,5,3\n")
    read = read_interactions(path, InteractionColumns(rating="stars"), None, EventRules(min_rating=4))
    assert (read.user_ids, read.item_ids, read.dropped["low_rating"]) == (["u", "v"], ["b", "a"], 1)
    # without a lowest rating the column is not even looked for
    assert len(read_interactions(path, InteractionColumns(rating="none"), None).user_index) == 3


def test_items_with_missing_texts_lists_and_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "items.jsonl",
        '{"item_id": 7, "title": "A &amp; B", "tags": ["x", ["y", "z"]], "year": 1999}\n'
        '{"item_id": "b", "title": null, "tags": [], "year": NaN}\n{"item_id": 9}\n',
    )
    ids, fields = read_items(path, "item_id", ["title", "tags", "year"])
    assert ids == ["7", "b", "9"]
    assert fields == {"title": ["A &amp; B", "", ""], "tags": ["x, y, z", "", ""], "year": ["1999", "", ""]}


def test_items_twice_and_texts_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", "item_id,title\n1,x\n2,y\n1,z\n")
    with pytest.raises(ValueError, match=r"distinct and line 2 has this one, got '1' in line 4, column 'item_id'"):
        read_items(path, "item_id", ["title"])
    path = write(tmp_path / "items.jsonl", '{"item_id": 1, "title": {"en": "x"}}\n')
    with pytest.raises(
        ValueError, match=r"a text must be a string, a number or a list, got .* in line 1, column 'title'"
    ):
        read_items(path, "item_id", ["title"])
