"""Checks of packed histories: a sentence with field, value and range before anything is looked up."""

import pytest
import torch
from torch import Tensor

from laser_fast.recommenders.protocol import check_histories, newest_items


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("items", "cu_seqlens", "message"),
    [
        (torch.tensor([0, 5]), _int32(0, 2), r"f: items must be in 0\.\.4, got 5; drop unknown items first"),
        (torch.tensor([-1, 0]), _int32(0, 2), r"f: items must be in 0\.\.4, got -1"),
        (torch.tensor([0, 1]), _int32(0, 1), "f: cu_seqlens must end at the number of packed rows 2, got 1"),
        (torch.tensor([0, 1]), _int32(0, 2, 1, 2), "f: cu_seqlens must not decrease, got 2 then 1 at position 1"),
        (torch.tensor([[0, 1]]), _int32(0, 2), r"f: items must have one dimension, got shape \(1, 2\)"),
    ],
    ids=["too large", "negative", "short", "falling", "two dimensions"],
)
def test_bad_histories_are_refused(items: Tensor, cu_seqlens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_histories("f", items, cu_seqlens, 5)


def test_bad_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"f: items must be int64, got torch\.float32"):
        check_histories("f", torch.tensor([0.0, float("nan")]), _int32(0, 2), 5)
    with pytest.raises(TypeError, match=r"f: cu_seqlens must be torch\.int32, got torch\.int64"):
        check_histories("f", torch.tensor([0, 1]), torch.tensor([0, 2]), 5)
    with pytest.raises(TypeError, match="f: cu_seqlens must be a tensor, got a list"):
        check_histories("f", torch.tensor([0, 1]), [0, 2], 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("items", "cu_seqlens"), [([0, 4], (0, 0, 2, 2)), ([], (0,))])
def test_good_histories_pass(items: list[int], cu_seqlens: tuple[int, ...]) -> None:
    given = torch.tensor(items, dtype=torch.int64)
    check_histories("f", given, _int32(*cu_seqlens), 5)  # raises nothing
    assert given.tolist() == items


def test_newest_items_are_kept() -> None:
    items, cu_seqlens = newest_items(torch.tensor([1, 2, 3, 4, 5, 6]), _int32(0, 3, 3, 4, 6), 2)
    assert items.tolist() == [2, 3, 4, 5, 6]
    assert cu_seqlens.tolist() == [0, 2, 2, 3, 5]
    assert cu_seqlens.dtype == torch.int32
