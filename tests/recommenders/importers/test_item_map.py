"""Item maps: which id an index of a foreign checkpoint stands for."""

from pathlib import Path

import pytest

from laser_fast.recommenders.importers.item_map import read_item_map


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("m.json", '["[PAD]", "a", 17]', {0: "[PAD]", 1: "a", 2: "17"}),
        ("m.json", '{"3": "a", "1": "b"}', {3: "a", 1: "b"}),
        ("m.csv", '\ufeffindex,title,item_id\n1,x,"a,b"\n0,y,é\n', {1: "a,b", 0: "é"}),
    ],
)
def test_maps_are_read(name: str, text: str, expected: dict[int, str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_item_map(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.tsv", b"", r"item map must be a .json or .csv file, got 'm.tsv'"),
        ("m.json", b"[1,", "m.json must be JSON, got"),
        ("m.json", b"3", "m.json must be a list or an object, got int"),
        ("m.json", b'{"x": "a"}', "m.json, entry 'x': the index must be a whole number, got 'x'"),
        ("m.json", b'{"1": "a", "01": "b"}', "m.json, entry '01': every index must stand there once, got 1 again"),
        ("m.json", b'["a", null]', "m.json, entry 1: the item id must be a string or a whole number, got None"),
        ("m.json", b"[true]", "m.json, entry 0: the item id must be a string or a whole number, got True"),
        ("m.csv", b"index,item\n1,a\n", "m.csv must have the columns index and item_id, got index, item"),
        ("m.csv", b"", "m.csv must have the columns index and item_id, got none"),
        ("m.csv", b"index,item_id\n1,a\n-2,b\n", "m.csv, line 3: the index must be a whole number, got '-2'"),
        ("m.csv", b"index,item_id\n1\n", "m.csv, line 2: the item id must be a string or a whole number, got None"),
        ("m.csv", b'index,item_id\n1,"a"b\n', "m.csv must be CSV, got"),
        ("m.csv", b"index,item_id\n1,\xff\n", "m.csv must be UTF-8, got"),
    ],
)
def test_bad_maps_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_item_map(tmp_path / name)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="item map must be a file, got"):
        read_item_map(tmp_path / "nowhere.json")
