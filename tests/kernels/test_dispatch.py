"""Kernels of dispatch and combine, forward and backward, against indexing and sums in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from laser_fast.kernels import dispatch as kernels
from laser_fast.ops import combine_queries_reference, dispatch_queries_reference
from laser_fast.ops.dispatch import _sum_by_product

from .kernel_cases import DTYPES

Check = Callable[..., None]


class Shape(NamedTuple):
    """One batch."""

    users: int
    top_k: int
    experts: int
    queries: int
    width: int


SHAPES = [
    pytest.param(Shape(1, 1, 1, 1, 1), id="ones"),
    pytest.param(Shape(5, 2, 4, 3, 7), id="odd-width"),
    pytest.param(Shape(0, 2, 4, 3, 7), id="no-user"),
    pytest.param(Shape(3, 2, 4, 0, 7), id="no-query"),
    pytest.param(Shape(4, 5, 5, 2, 8), id="k=E"),
    pytest.param(Shape(3, 3, 7, 9, 7), id="one-short-of-a-sums-columns"),
    pytest.param(Shape(3, 3, 7, 5, 13), id="one-past-a-sums-columns"),
    pytest.param(Shape(21, 3, 7, 2, 16), id="one-short-of-a-sums-slabs"),
    pytest.param(Shape(65, 1, 7, 2, 16), id="one-past-a-sums-slabs"),
    pytest.param(Shape(11, 3, 33, 3, 11), id="E33"),
    pytest.param(Shape(7, 2, 100, 5, 13), id="E100"),
    pytest.param(Shape(2, 2, 3, 3, 341), id="one-short-of-a-block"),
    pytest.param(Shape(2, 2, 3, 25, 41), id="one-past-a-block"),
    pytest.param(Shape(3, 2, 8, 3, 768), id="several-blocks"),
]


class Batch(NamedTuple):
    """Inputs and gradients of one shape."""

    queries: Tensor
    expert: Tensor
    outputs: Tensor
    weight: Tensor
    grad: Tensor


@pytest.fixture
def make(device: torch.device) -> Callable[..., Batch]:
    def inner(shape: Shape, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype = torch.float32) -> Batch:
        generator = torch.Generator().manual_seed(5)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        users, top_k, experts, *slab = shape
        expert = torch.rand(users, experts, generator=generator).argsort(dim=1)[:, :top_k].int().to(device)
        weight = torch.rand(users, top_k, generator=generator).softmax(dim=1).to(device, weight_dtype)
        return Batch(normal(experts, *slab), expert, normal(users * top_k, *slab), weight, normal(users, *slab))

    return inner


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dispatch_copies_bit_for_bit(shape: Shape, dtype: torch.dtype, make: Callable[..., Batch]) -> None:
    batch = make(shape, dtype)
    dispatched = kernels.dispatch_forward(batch.queries, batch.expert)
    assert torch.equal(dispatched, dispatch_queries_reference(batch.queries, batch.expert))
    assert dispatched.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dispatch_backward(
    shape: Shape, dtype: torch.dtype, make: Callable[..., Batch], assert_accurate: Check
) -> None:
    batch = make(shape, dtype)
    total = kernels.dispatch_backward(batch.outputs, batch.expert, shape.experts)
    exact = torch.zeros_like(batch.queries, dtype=torch.float64)
    exact.index_add_(0, batch.expert.flatten(), batch.outputs.double())
    eager = _sum_by_product(batch.outputs, batch.expert, shape.experts)
    assert_accurate(total, eager, exact, "queries")


@pytest.mark.parametrize("experts", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_nobody_chose_and_one_chosen_by_all(
    dtype: torch.dtype, experts: int, make: Callable[..., Batch]
) -> None:
    batch = make(Shape(70, 1, experts, 3, 7), dtype)
    expert = torch.full_like(batch.expert, 1)
    total = kernels.dispatch_backward(torch.ones_like(batch.outputs), expert, experts)
    assert [slab.unique().tolist() for slab in total] == [[70.0 if index == 1 else 0.0] for index in range(experts)]


@pytest.mark.parametrize("experts", [2, 20])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_long_sums_are_in_float32(dtype: torch.dtype, experts: int, device: torch.device) -> None:
    # a third, and steps of 64 of it, round the same way every time: a sum in half precision would be off by a percent
    grad = torch.full((3000, 1, 8), 1 / 3, dtype=dtype, device=device)
    total = kernels.dispatch_backward(grad, torch.ones(3000, 1, dtype=torch.int32, device=device), experts)
    exact = 3000 * grad[0].double()
    assert (total[1].double() / exact - 1).abs().max() <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=["fp32-weight", "fp16-weight"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_combine(
    shape: Shape,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    make: Callable[..., Batch],
    assert_accurate: Check,
) -> None:
    batch = make(shape, dtype, weight_dtype)
    wide = [tensor.double() for tensor in (batch.outputs, batch.weight)]
    combined = kernels.combine_forward(batch.outputs, batch.weight)
    eager, exact = combine_queries_reference(batch.outputs, batch.weight), combine_queries_reference(*wide)
    assert_accurate(combined, eager, exact, "combined")

    needs = {"needs_outputs": True, "needs_weight": True}
    grads = kernels.combine_backward(batch.grad, batch.outputs, batch.weight, **needs)
    plain = torch.ops.laser_fast.combine_queries_backward
    exact_grads = plain(batch.grad.double(), *wide, True, True)
    eager_outputs, eager_weight = plain(batch.grad, batch.outputs, batch.weight, True, True)
    assert_accurate(grads[0], eager_outputs, exact_grads[0], "outputs")
    # a user's k sums are one row; so few are right by luck, so eager adds up in up to ten orders
    order = torch.Generator().manual_seed(1)

    def draws() -> Iterator[Tensor]:
        yield eager_weight
        for _ in range(9):
            columns = torch.randperm(shape.width, generator=order).to(batch.grad.device)
            yield plain(batch.grad[..., columns], batch.outputs[..., columns], batch.weight, False, True)[1]

    assert_accurate(grads[1], draws(), exact_grads[1], "weight")


@pytest.mark.parametrize("weight", [False, True], ids=["no-weight", "weight"])
@pytest.mark.parametrize("outputs", [False, True], ids=["no-outputs", "outputs"])
@pytest.mark.parametrize("users", [3, 0])
def test_what_is_not_needed_is_empty_and_changes_nothing(
    users: int, outputs: bool, weight: bool, make: Callable[..., Batch]
) -> None:
    batch = make(Shape(users, 2, 4, 25, 41))
    arguments = batch.grad, batch.outputs, batch.weight
    full = kernels.combine_backward(*arguments, needs_outputs=True, needs_weight=True)
    actual = kernels.combine_backward(*arguments, needs_outputs=outputs, needs_weight=weight)
    for needed, one, other in zip((outputs, weight), actual, full, strict=True):
        assert torch.equal(one, other if needed else other.new_empty(0))


def test_a_user_is_combined_alone_as_among_others(make: Callable[..., Batch]) -> None:
    batch = make(Shape(6, 3, 7, 25, 41))
    together = kernels.combine_forward(batch.outputs, batch.weight)
    for user in range(6):
        alone = kernels.combine_forward(batch.outputs[3 * user : 3 * user + 3], batch.weight[user : user + 1])
        assert torch.equal(alone[0], together[user])
