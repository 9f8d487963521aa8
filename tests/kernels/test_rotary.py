"""The kernel that rotates queries and keys, both ways, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from laser_fast.kernels.rotary import rotary
from laser_fast.ops import rotary_embedding_reference

from .kernel_cases import DTYPES

Check = Callable[..., None]


class Shape(NamedTuple):
    """One batch of queries and keys, and the width R of the tables."""

    tokens: int
    query_heads: int
    key_heads: int
    size: int
    width: int


SHAPES = [
    pytest.param(Shape(1, 1, 1, 2, 2), id="ones"),
    pytest.param(Shape(7, 4, 2, 8, 8), id="grouped"),
    pytest.param(Shape(3, 9, 9, 128, 128), id="one-past-a-block-of-heads"),
    pytest.param(Shape(3, 7, 1, 128, 128), id="one-short-of-a-block-of-heads"),
    pytest.param(Shape(5, 3, 1, 96, 96), id="half-of-48"),
    pytest.param(Shape(5, 3, 1, 6, 6), id="half-of-3"),
    pytest.param(Shape(4, 5, 2, 80, 32), id="partial"),
    pytest.param(Shape(4, 2, 2, 7, 2), id="partial-in-an-odd-head"),
    pytest.param(Shape(4, 2, 2, 6, 0), id="nothing-rotated"),
    pytest.param(Shape(2, 2, 1, 2048, 2048), id="wider-than-a-block"),
    pytest.param(Shape(0, 4, 2, 8, 8), id="no-token"),
    pytest.param(Shape(5, 0, 2, 8, 8), id="no-query-head"),
    pytest.param(Shape(5, 4, 0, 8, 8), id="no-key-head"),
    pytest.param(Shape(5, 0, 0, 8, 8), id="no-head"),
]


class Batch(NamedTuple):
    """Arguments of the launcher; the halves of the tables differ, as no rule says that they must not."""

    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor

    def double(self) -> Batch:
        return Batch(*[tensor.double() for tensor in self])


@pytest.fixture
def make(device: torch.device) -> Callable[..., Batch]:
    def inner(shape: Shape, dtype: torch.dtype = torch.float32, table: torch.dtype | None = None) -> Batch:
        generator = torch.Generator().manual_seed(5)
        query, key = (
            torch.randn(shape.tokens, heads, shape.size, generator=generator)
            for heads in (shape.query_heads, shape.key_heads)
        )
        angles = torch.randn(shape.tokens, shape.width, generator=generator) * 3
        tables = (angles.cos() * 1.2).to(table or dtype), (angles.sin() * 1.2).to(table or dtype)
        return Batch(*[tensor.to(device) for tensor in (query.to(dtype), key.to(dtype), *tables)])

    return inner


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("table", [None, torch.float32], ids=["tables-alike", "tables-fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation(
    shape: Shape,
    dtype: torch.dtype,
    table: torch.dtype | None,
    transposed: bool,
    make: Callable[..., Batch],
    assert_accurate: Check,
) -> None:
    batch = make(shape, dtype, table)
    actual = rotary(*batch, transposed=transposed)
    eager = rotary_embedding_reference(*batch, transposed=transposed)
    exact = rotary_embedding_reference(*batch.double(), transposed=transposed)
    for name, ours, plain, true in zip(("query", "key"), actual, eager, exact, strict=True):
        assert ours.is_contiguous()
        assert_accurate(ours, plain, true, name)
        rest = slice(shape.width, None)
        assert torch.equal(ours[..., rest], getattr(batch, name)[..., rest])


def test_a_rotation_by_a_quarter_turn_by_hand(device: torch.device) -> None:
    query, zero = torch.arange(1.0, 6.0, device=device).view(1, 1, 5), torch.zeros(1, 4, device=device)
    turned, _ = rotary(query, query[:, :0], zero, zero + 1, transposed=False)
    back, _ = rotary(turned, query[:, :0], zero, zero + 1, transposed=True)
    assert turned.flatten().tolist() == [-3.0, -4.0, 1.0, 2.0, 5.0]
    assert back.flatten().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_token_is_rotated_alone_as_among_others(make: Callable[..., Batch]) -> None:
    batch = make(Shape(6, 5, 2, 24, 16), torch.float16)
    together = rotary(*batch, transposed=False)
    for token in range(6):
        alone = rotary(*[tensor[token : token + 1] for tensor in batch], transposed=False)
        assert all(torch.equal(one[0], many[token]) for one, many in zip(alone, together, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    tokens, tail = 2**31 // (4 * 1024) + 64, 8
    if torch.cuda.mem_get_info(device)[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    query: Any = torch.randn(tokens, 4, 1024, dtype=torch.float16, device=device)
    key = query[:, :1]
    cos, sin = torch.rand(2, tokens, 1024, device=device)
    assert (tokens - tail) * 4 * 1024 > 1 << 31
    rotated = rotary(query, key, cos, sin, transposed=False)
    last = rotary(query[-tail:], key[-tail:], cos[-tail:], sin[-tail:], transposed=False)
    assert all(torch.equal(many[-tail:], few) for many, few in zip(rotated, last, strict=True))
