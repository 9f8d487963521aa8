"""The item table: ids in index order, text columns, the hash of the item map."""

import numpy as np
import pytest

from laser_fast.data import ItemTable


def test_index_of_gives_positions_and_minus_one_for_unknown_ids() -> None:
    table = ItemTable(["b", "a", "10"])
    index = table.index_of(["10", "b", "x", "b"])
    assert index.dtype == np.int64
    assert index.tolist() == [2, 0, -1, 0]
    assert table.index_of([]).tolist() == []
    assert len(table) == 3


@pytest.mark.parametrize(
    "ids, fields, message",
    [
        (["a", "b", "a"], {}, "must be distinct, got 'a' twice"),
        (["a", ""], {}, "must not be empty, got ''"),
        (["a"], {"title": ["x", "y"]}, r"column 'title' must have one text per item \(1\), got 2"),
        (["a"], {"id": ["x"]}, "a name other than 'id', got 'id'"),
    ],
    ids=["repeated", "empty", "length", "reserved"],
)
def test_bad_tables_are_refused(ids: list[str], fields: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemTable(ids, fields)


def test_ids_and_texts_must_be_strings() -> None:
    with pytest.raises(TypeError, match="item ids must be strings, got 3"):
        ItemTable([3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="column 'title' must hold strings, got None"):
        ItemTable(["a"], {"title": [None]})  # type: ignore[list-item]


def test_hash_follows_ids_and_their_order_but_not_texts() -> None:
    table = ItemTable(["ab", "c"], {"title": ["x", "y"]})
    assert table.hash() == ItemTable(["ab", "c"]).hash()
    assert table.hash() != ItemTable(["c", "ab"]).hash()
    assert table.hash() != ItemTable(["a", "bc"]).hash()
