"""Requests in external ids: what names an item, and what is refused instead of being dropped."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from laser_fast.retrieval.requests import blocked_items, pack_histories, wanted_items

NUMBERED = {"7": 0, "10": 1, "x": 2}
NAMED = {"a": 0, "b": 1}


class Column:
    """As a data frame gives one."""

    ndim = 1

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


class Table(Column):
    """As a data frame, whose elements are the names of its columns."""

    ndim = 2
    columns = ("a", "b")


@pytest.mark.parametrize(
    "histories",
    [
        [["7", "10", "7"], ["x"], []],
        [[7, 10, 7], ["x"], []],
        [np.array([7, 10, 7]), ("x",), np.array([])],
        [[np.int32(7), np.str_("10"), "7"], np.array(["x"]), ()],
        Column([[7, "10", 7], Column(["x"]), []]),
        (history for history in ([7, 10, 7], iter(["x"]), [])),
        [torch.tensor([7, 10, 7]), ["x"], torch.tensor([])],
    ],
    ids=["text", "numbers", "arrays", "scalars", "columns", "generator", "tensors"],
)
def test_histories_of_every_kind(histories: Any) -> None:
    packed = pack_histories(histories, NUMBERED)
    assert packed.items.tolist() == [0, 1, 0, 2] and packed.cu_seqlens.tolist() == [0, 3, 4, 4]


def test_a_table_of_numbers_is_histories_of_one_length() -> None:
    assert pack_histories(np.array([[7, 10], [10, 7]]), NUMBERED).items.tolist() == [0, 1, 1, 0]


def test_unknown_numbers_are_dropped_where_the_catalogue_has_numbers() -> None:
    with pytest.warns(UserWarning, match="2 ids are not in the catalogue and were dropped, the first is '8'$"):
        assert pack_histories([[8, 7, "y"], []], NUMBERED).items.tolist() == [0]
    with pytest.warns(UserWarning, match="the first is '8'; nothing is left of 2 histories, which are answered as"):
        assert pack_histories([[8], [7], ["y", 9]], NUMBERED).items.tolist() == [0]
    with pytest.raises(
        TypeError, match="a history must name items as the catalogue does, by text like 'a', got the nu"
    ):
        pack_histories([[1]], NAMED)


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ("ab", "histories must be a list of histories, got a str: 'ab'"),
        ({"a": ["b"]}, "histories must be a list of histories, got a dict"),
        (None, "histories must be a list of histories, got a NoneType: None"),
        (Table([]), "histories must be a list of histories, got a Table"),
        ({("a",)}, "histories must be a list of histories, got a set"),
        (7, "histories must be a list of histories, got a int: 7"),
        (["ab"], "a history must be a list of item ids, got a str: 'ab'"),
        ([b"ab"], "a history must be a list of item ids, got a bytes: b'ab'"),
        ([None], "a history must be a list of item ids, got a NoneType: None"),
        ([7], "a history must be a list of item ids, got a int: 7"),
        ([{"a": 1}], "a history must be a list of item ids, got a dict"),
        ([{"a", "b"}], "a history must be a list of item ids, got a set"),
        (np.array(["a", "b"]), "a history must be a list of item ids, got a str_"),
        ([np.array(7)], "a history must be a list of item ids, got a ndarray"),
        ([["a", ["b"]]], "a history must be a list of item ids (text or whole numbers), got ['b']"),
        ([["a", None]], "a history must be a list of item ids (text or whole numbers), got None"),
        ([[7.0]], "a history must be a list of item ids (text or whole numbers), got 7.0"),
        ([[np.nan]], "a history must be a list of item ids (text or whole numbers), got nan"),
        ([[True]], "a history must be a list of item ids (text or whole numbers), got True"),
        ([np.array([True])], "a history must be a list of item ids (text or whole numbers), got "),
        ([[b"a"]], "a history must be a list of item ids (text or whole numbers), got b'a'"),
    ],
)
def test_what_is_no_list_of_histories_is_refused(histories: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        pack_histories(histories, NAMED)


def test_exclude_and_allow_take_ids_in_any_order() -> None:
    assert blocked_items({10, "x"}, None, NUMBERED).tolist() == [False, True, True]
    assert blocked_items((), (item for item in (7, np.int64(10))), NUMBERED).tolist() == [False, False, True]
    assert blocked_items({}.keys(), NUMBERED.keys(), NUMBERED).tolist() == [False] * 3
    with pytest.raises(ValueError, match="exclude must name items of the catalogue, got '8'"):
        blocked_items([8], None, NUMBERED)


@pytest.mark.parametrize("wrong", ["a", {"a": 1}, None, 7, [["a"]], [None], [1.5], [True], [3]], ids=repr)
@pytest.mark.parametrize("argument", ["exclude", "allow"])
def test_what_is_no_list_of_ids_is_refused_by_its_argument(argument: str, wrong: Any) -> None:
    if argument == "allow" and wrong is None:
        return
    with pytest.raises(TypeError, match=rf"recommend: {argument} must "):
        blocked_items(*((wrong, None) if argument == "exclude" else ((), wrong)), NAMED)


def test_k_is_a_whole_number() -> None:
    assert wanted_items(np.int64(3)) == 3 and type(wanted_items(np.int64(3))) is int
    for wrong in (True, np.True_, 3.0, "3", None, np.array(3), torch.tensor(3)):
        with pytest.raises(TypeError, match=r"recommend: k must be a whole number, got "):
            wanted_items(wrong)
    with pytest.raises(ValueError, match="recommend: k must be at least 1, got 0"):
        wanted_items(0)
