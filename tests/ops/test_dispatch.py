"""Dispatch and combine against indexing one user at a time, with every gradient, at their edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from laser_fast.ops import (
    combine_queries,
    combine_queries_reference,
    dispatch_queries,
    dispatch_queries_reference,
)
from laser_fast.ops.dispatch import _sum_by_product

RowError = Callable[[Tensor, Tensor], float]

SHAPES = [  # users, k, experts, query tokens, width
    pytest.param((1, 1, 1, 1, 1), id="ones"),
    pytest.param((5, 2, 4, 3, 7), id="odd-width"),
    pytest.param((0, 2, 4, 3, 7), id="no-user"),
    pytest.param((33, 3, 8, 4, 16), id="many-users"),
]
Shape = tuple[int, int, int, int, int]


def _inputs(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, expert, outputs, weight."""
    users, top_k, experts, num_queries, width = shape
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(experts, num_queries, width, generator=generator, dtype=torch.float64)
    expert = torch.rand(users, experts, generator=generator).argsort(dim=1)[:, :top_k].int()
    outputs = torch.randn(users * top_k, num_queries, width, generator=generator, dtype=torch.float64)
    weight = torch.rand(users, top_k, generator=generator, dtype=torch.float64).softmax(1)
    return queries.to(dtype), expert, outputs.to(dtype), weight.float() if dtype != torch.float64 else weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dispatch", [dispatch_queries, dispatch_queries_reference], ids=["op", "reference"])
def test_dispatch_equals_indexing(dispatch: Callable[..., Tensor], shape: Shape) -> None:
    queries, expert, _, _ = _inputs(shape)
    dispatched = dispatch(queries, expert)
    assert dispatched.shape == (shape[0] * shape[1], *queries.shape[1:])
    for b, row in enumerate(expert.tolist()):
        for j, index in enumerate(row):
            assert torch.equal(dispatched[b * shape[1] + j], queries[index])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("combine", [combine_queries, combine_queries_reference], ids=["op", "reference"])
def test_combine_equals_a_sum_per_user(combine: Callable[..., Tensor], shape: Shape) -> None:
    _, _, outputs, weight = _inputs(shape)
    combined = combine(outputs, weight)
    assert combined.shape == (shape[0], *outputs.shape[1:])
    for b, row in enumerate(weight):
        expected = sum(row[j] * outputs[b * shape[1] + j] for j in range(shape[1]))
        torch.testing.assert_close(combined[b], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_operations_and_references_agree(shape: Shape) -> None:
    queries, expert, outputs, weight = _inputs(shape)
    inputs = [tensor.requires_grad_() for tensor in (queries, outputs, weight)]
    grads = []
    for dispatch, combine in (
        (dispatch_queries, combine_queries),
        (dispatch_queries_reference, combine_queries_reference),
    ):
        # the product makes every element of the incoming gradients different
        result = combine(dispatch(queries, expert) * outputs, weight)
        grads.append(torch.autograd.grad((result * result.detach().cos()).sum(), inputs))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_form_for_other_devices_sums_per_expert_too(
    shape: Shape, dtype: torch.dtype, worst_row_error: RowError
) -> None:
    queries, expert, outputs, _ = _inputs(shape, dtype)
    expected = torch.zeros(queries.shape, dtype=torch.float64)
    expected.index_add_(0, expert.flatten(), outputs.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = _sum_by_product(outputs, expert, shape[2])
    assert actual.dtype == dtype
    # one rounding to the dtype, of a sum in float32 at least
    assert worst_row_error(actual, expected) < max(torch.finfo(dtype).eps, 1e-12) * (4 if dtype.itemsize == 4 else 1)


def test_gradcheck() -> None:
    queries, expert, outputs, weight = _inputs((3, 2, 4, 2, 3))
    assert torch.autograd.gradcheck(lambda x: dispatch_queries(x, expert), queries.requires_grad_())
    assert torch.autograd.gradcheck(combine_queries, (outputs.requires_grad_(), weight.requires_grad_()))


def test_an_expert_nobody_chose_has_gradient_zero_and_one_chosen_by_all_the_sum() -> None:
    queries = torch.ones(3, 2, 4, requires_grad=True)
    dispatch_queries(queries, torch.full((7, 1), 1, dtype=torch.int32)).sum().backward()
    assert queries.grad is not None
    assert [slab.unique().tolist() for slab in queries.grad] == [[0.0], [7.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_add_up_in_float32(dtype: torch.dtype, worst_row_error: RowError) -> None:
    queries, expert, outputs, weight = _inputs((200, 3, 4, 2, 8), dtype)
    inputs = [tensor.requires_grad_() for tensor in (queries, outputs, weight)]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]

    dispatched, combined = dispatch_queries(queries, expert), combine_queries(outputs, weight)
    assert dispatched.dtype == combined.dtype == dtype
    exact_combined = combine_queries_reference(*exact_inputs[1:])
    # one rounding to the dtype, of a sum whose float32 error is below 8 eps
    limit = max(torch.finfo(dtype).eps, 1e-6)
    assert worst_row_error(combined, exact_combined) < limit

    grads = torch.autograd.grad([(dispatched.float() * outputs.detach().float()).sum(), combined.sum()], inputs)
    exact_dispatched = dispatch_queries_reference(exact_inputs[0], expert)
    exact_loss = (exact_dispatched * exact_inputs[1].detach()).sum() + exact_combined.sum()
    exact_grads = torch.autograd.grad(exact_loss, exact_inputs)
    for actual, expected, tensor in zip(grads, exact_grads, inputs, strict=True):
        assert actual.dtype == tensor.dtype
        # the sum over 150 slabs of one expert would be off by 5 % in bfloat16
        assert worst_row_error(actual, expected) < limit


def test_strides_do_not_matter_and_inputs_stay_as_they_were() -> None:
    queries, expert, outputs, weight = _inputs((5, 2, 4, 3, 7))
    before = [tensor.clone() for tensor in (queries, expert, outputs, weight)]

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    dispatched = dispatch_queries(strided(queries), strided(expert))
    assert torch.equal(dispatched, dispatch_queries(queries, expert))
    assert dispatched.is_contiguous()
    combined = combine_queries(strided(outputs), strided(weight))
    assert torch.equal(combined, combine_queries(outputs, weight))
    assert combined.is_contiguous()
    after = (queries, expert, outputs, weight)
    assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))


@pytest.mark.parametrize("turned", ["weight", "outputs", "both"])
def test_combining_with_strided_inputs_has_the_gradients_of_dense_ones(turned: str) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, weight = (torch.randn(shape, generator=generator) for shape in ((6, 4, 3), (2, 3)))
    grad = torch.randn(4, 2, 3, generator=generator).transpose(0, 1)
    dense = outputs.clone().requires_grad_(), weight.clone().requires_grad_()
    strided = [
        leaf.mT.contiguous().mT.requires_grad_() if turned in (name, "both") else leaf.clone().requires_grad_()
        for name, leaf in (("outputs", outputs), ("weight", weight))
    ]
    expected = torch.autograd.grad(combine_queries(*dense), dense, grad)
    found = torch.autograd.grad(combine_queries(*strided), strided, grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # sums of 12 in another order
    torch.library.opcheck(torch.ops.laser_fast.combine_queries.default, tuple(strided))


_QUERIES, _EXPERT = torch.zeros(4, 3, 2), torch.zeros(5, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((_QUERIES.int(), _EXPERT), TypeError, "queries must be floating point, got torch.int32"),
        ((_QUERIES, _EXPERT.long()), TypeError, "expert must be torch.int32, got torch.int64"),
        ((_QUERIES[0], _EXPERT), ValueError, r"queries must have 3 dimensions, got shape \(3, 2\)"),
        ((_QUERIES, _EXPERT[0]), ValueError, r"expert must have 2 dimensions, got shape \(2,\)"),
        ((_QUERIES, _EXPERT.to("meta")), ValueError, "one device, got queries on cpu, expert on meta"),
    ],
)
def test_dispatch_checks_its_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^dispatch_queries: .*{message}"):
        dispatch_queries(*arguments)


_OUTPUTS, _WEIGHT = torch.zeros(10, 3, 2), torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((_OUTPUTS.int(), _WEIGHT), TypeError, "outputs must be floating point, got torch.int32"),
        ((_OUTPUTS, _WEIGHT.long()), TypeError, "weight must be floating point, got torch.int64"),
        ((_OUTPUTS[0], _WEIGHT), ValueError, r"outputs must have 3 dimensions, got shape \(3, 2\)"),
        ((_OUTPUTS, _WEIGHT[0]), ValueError, r"weight must have 2 dimensions, got shape \(2,\)"),
        ((_OUTPUTS, _WEIGHT.to("meta")), ValueError, "one device, got outputs on cpu, weight on meta"),
        ((_OUTPUTS[1:], _WEIGHT), ValueError, r"one slab per entry of weight, got 9 slabs and weight \(5, 2\)"),
    ],
)
def test_combine_checks_its_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^combine_queries: .*{message}"):
        combine_queries(*arguments)
