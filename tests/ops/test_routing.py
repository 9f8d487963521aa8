"""Routing against a derivation in NumPy float64, against hand-computed tables, and at its edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.ops import Routing, cu_seqlens_from_lengths, route_experts, route_experts_reference
from laser_fast.ops.routing import WEIGHTINGS

RowError = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Case:
    """One batch: history lengths, width, experts, chosen experts."""

    lengths: tuple[int, ...]
    width: int
    experts: int
    top_k: int

    def arguments(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(17)
        states = torch.randn(sum(self.lengths), self.width, generator=generator, dtype=torch.float64)
        weight = torch.randn(self.experts, self.width, generator=generator, dtype=torch.float64)
        weight /= self.width**0.5  # logits of size 1, as a trained router has them
        bias = torch.randn(self.experts, generator=generator, dtype=torch.float64)
        cu_seqlens = cu_seqlens_from_lengths(torch.tensor(self.lengths, dtype=torch.int64))
        return states.to(dtype), weight.to(dtype), bias.to(dtype), cu_seqlens, self.top_k


CASES = [
    pytest.param(Case((1,), 1, 4, 2), id="one-item"),
    pytest.param(Case((0, 3, 0, 0, 5, 1, 0), 8, 4, 2), id="empties-everywhere"),
    pytest.param(Case((0, 0), 8, 4, 2), id="all-empty"),
    pytest.param(Case((), 8, 4, 2), id="no-user"),
    pytest.param(Case((3, 4), 8, 1, 1), id="one-expert"),
    pytest.param(Case((3, 4, 2), 8, 4, 4), id="all-experts"),
    pytest.param(Case((7, 1, 20, 2), 33, 7, 3), id="odd-widths"),
    pytest.param(Case((65, 10, 31, 127), 16, 8, 3), id="long"),
]


def _derive(states: Any, weight: Any, bias: Any, lengths: tuple[int, ...], k: int, weighting: str) -> dict[str, Any]:
    """The formulas of the design, one user and one item at a time."""
    num_items, num_experts = states.shape[0], weight.shape[0]

    def best(values: Any) -> list[int]:
        return sorted(range(num_experts), key=lambda e: (-values[e], e))[:k]

    scores = []
    for row in states:
        raised = np.exp(weight @ row + bias)
        scores.append(raised / raised.sum())
    expert, chosen_weight, pooled = [], [], []
    start = 0
    for length in lengths:
        mean = sum(scores[start : start + length]) / length if length else np.full(num_experts, 1 / num_experts)
        start += length
        chosen = mean[best(mean)]
        share = np.exp(chosen) if weighting == "softmax" else chosen
        expert.append(best(mean))
        pooled.append(mean)
        chosen_weight.append(share / share.sum())
    load = np.zeros(num_experts)
    for row in scores:
        for index in best(row):
            load[index] += 1 / num_items
    balance = num_experts * float(sum(scores) / num_items @ load) if num_items else 0.0
    return {
        "expert": np.array(expert, dtype=np.int32).reshape(len(lengths), k),
        "weight": np.array(chosen_weight).reshape(len(lengths), k),
        "pooled": np.array(pooled).reshape(len(lengths), num_experts),
        "balance_loss": np.array(balance),
        "load": load,
    }


def _objective(routing: Routing) -> Tensor:
    """A scalar in which every differentiable result counts, with uneven shares."""
    ramp = torch.arange(1, routing.weight.numel() + 1, dtype=routing.weight.dtype).view(routing.weight.shape)
    return (routing.weight * ramp).sum() + (routing.pooled**2).sum() * 3 + routing.balance_loss * 5


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("route", [route_experts, route_experts_reference], ids=["op", "reference"])
def test_equals_the_derivation(route: Callable[..., Routing], case: Case, weighting: str) -> None:
    states, weight, bias, cu_seqlens, top_k = case.arguments()
    routing = route(states, weight, bias, cu_seqlens, top_k, weighting=weighting)
    expected = _derive(states.numpy(), weight.numpy(), bias.numpy(), case.lengths, top_k, weighting)
    assert routing.expert.dtype == torch.int32
    np.testing.assert_array_equal(routing.expert.numpy(), expected.pop("expert"))
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(routing, name).numpy(), value, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_operation_and_reference_agree(case: Case, weighting: str) -> None:
    *tensors, cu_seqlens, top_k = case.arguments()
    inputs = [tensor.requires_grad_() for tensor in tensors]
    grads = []
    for route in (route_experts, route_experts_reference):
        routing = route(*inputs, cu_seqlens, top_k, weighting=weighting)
        grads.append(torch.autograd.grad(_objective(routing), inputs))
    for actual, expected in zip(*grads, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradcheck(weighting: str) -> None:
    *tensors, cu_seqlens, top_k = Case((2, 0, 4), 3, 4, 2).arguments()
    inputs = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(
        lambda *given: tuple(route_experts(*given, cu_seqlens, top_k, weighting=weighting)[1:4]), inputs
    )


def test_only_weight_pooled_and_balance_loss_carry_gradients() -> None:
    *tensors, cu_seqlens, top_k = Case((2, 0, 4), 3, 4, 2).arguments()
    for route in (route_experts, route_experts_reference):
        routing = route(*[tensor.requires_grad_() for tensor in tensors], cu_seqlens, top_k)
        wants = {name for name in routing._fields if getattr(routing, name).requires_grad}
        assert wants == {"weight", "pooled", "balance_loss"}


def test_an_empty_history_is_uniform_and_without_influence() -> None:
    states, weight, bias, cu_seqlens, _ = Case((0, 3, 0), 5, 4, 2).arguments()
    weight.requires_grad_()
    routing = route_experts(states, weight, bias, cu_seqlens, 2)
    assert torch.equal(routing.pooled[[0, 2]], torch.full((2, 4), 0.25, dtype=torch.float64))
    assert routing.expert[[0, 2]].tolist() == [[0, 1], [0, 1]]
    (grad,) = torch.autograd.grad(routing.pooled[0, 0] * 7 + routing.weight[2, 1] * 3, weight)
    assert torch.equal(grad, torch.zeros_like(grad))
    alone = route_experts(states, weight, bias, torch.tensor([0, 3], dtype=torch.int32), 2)
    assert torch.equal(routing.balance_loss, alone.balance_loss)


def test_batch_composition_changes_nothing() -> None:
    case = Case((5, 0, 12, 1, 7, 3), 24, 8, 3)
    states, weight, bias, cu_seqlens, top_k = case.arguments()
    together = route_experts(states, weight, bias, cu_seqlens, top_k)
    rows = states.split(case.lengths)
    order = [3, 5, 0, 4, 2, 1]
    permuted = route_experts(
        torch.cat([rows[user] for user in order]),
        weight,
        bias,
        cu_seqlens_from_lengths(torch.tensor([case.lengths[user] for user in order])),
        top_k,
    )
    for user, length in enumerate(case.lengths):
        alone = route_experts(rows[user], weight, bias, torch.tensor([0, length], dtype=torch.int32), top_k)
        for other, place in ((alone, 0), (permuted, order.index(user))):
            assert torch.equal(other.expert[place], together.expert[user])
            # the matrix product may add up in another order for another batch size, nothing else may differ
            torch.testing.assert_close(other.pooled[place], together.pooled[user], rtol=0, atol=1e-14)
            torch.testing.assert_close(other.weight[place], together.weight[user], rtol=0, atol=1e-14)
    torch.testing.assert_close(permuted.load, together.load, rtol=0, atol=1e-14)
    torch.testing.assert_close(permuted.balance_loss, together.balance_loss, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("top_k", "load", "balance_loss"),
    [
        pytest.param(1, [0.5, 0.5, 0.0], 1.125, id="k=1"),
        pytest.param(2, [0.5, 1.0, 0.5], 2.175, id="k=2"),
        pytest.param(3, [1.0, 1.0, 1.0], 3.0, id="k=3"),
    ],
)
def test_balance_loss_by_hand(top_k: int, load: list[float], balance_loss: float) -> None:
    # softmax(log s) = s; mean probabilities are .3, .45, .25; 1.125 = 3 (.3 .5 + .45 .5), 2.175 = 3 (.15 + .45 + .125)
    states = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64).log()
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    routing = route_experts(states, eye, zero, torch.tensor([0, 1, 2], dtype=torch.int32), top_k)
    assert routing.load.tolist() == pytest.approx(load)
    assert routing.balance_loss.item() == pytest.approx(balance_loss)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_ties_go_to_the_lowest_expert_and_uniform_routing_costs_k(top_k: int) -> None:
    states = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    routing = route_experts(
        states, torch.zeros(8, 4), torch.zeros(8), torch.tensor([0, 2, 6], dtype=torch.int32), top_k
    )
    assert routing.expert.tolist() == [list(range(top_k))] * 2
    assert routing.load.tolist() == [1.0] * top_k + [0.0] * (8 - top_k)
    assert routing.balance_loss.item() == pytest.approx(top_k)


def test_partial_ties_go_to_the_lowest_expert() -> None:
    bias = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    routing = route_experts(torch.ones(3, 2), torch.zeros(6, 2), bias, torch.tensor([0, 3], dtype=torch.int32), 4)
    assert routing.expert.tolist() == [[1, 3, 2, 4]]
    assert routing.load.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_routed_in_float32(dtype: torch.dtype, worst_row_error: RowError) -> None:
    *narrow, cu_seqlens, top_k = Case((65, 10, 31, 0, 127), 64, 8, 3).arguments(dtype)
    inputs = [tensor.requires_grad_() for tensor in narrow]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in narrow]
    routing = route_experts(*inputs, cu_seqlens, top_k)
    exact = route_experts_reference(*exact_inputs, cu_seqlens, top_k)
    assert torch.equal(routing.expert, exact.expert)
    for name in ("weight", "pooled", "load"):
        assert getattr(routing, name).dtype == torch.float32
        # the operands are exact, so only the float32 sums over 64 entries round: 1e-6 is 8 eps
        assert worst_row_error(getattr(routing, name), getattr(exact, name).detach()) < 1e-6, name
    grads = torch.autograd.grad(_objective(routing), inputs)
    eager = torch.autograd.grad(_objective(route_experts_reference(*inputs, cu_seqlens, top_k)), inputs)
    exact_grads = torch.autograd.grad(_objective(exact), exact_inputs)
    for actual, plain, expected in zip(grads, eager, exact_grads, strict=True):
        assert actual.dtype == dtype
        # at most twice the error of plain PyTorch, which is as large as the rounding to the input's dtype
        limit = 2 * worst_row_error(plain, expected) + torch.finfo(dtype).eps
        assert limit < 0.02
        assert worst_row_error(actual, expected) <= limit


def test_large_logits_stay_finite() -> None:
    *tensors, cu_seqlens, top_k = Case((5, 3), 32, 8, 3).arguments(torch.float32)
    inputs = [(tensor * 1e4).requires_grad_() for tensor in tensors]
    routing = route_experts(*inputs, cu_seqlens, top_k, weighting="renormalize")
    grads = torch.autograd.grad(_objective(routing), inputs)
    assert all(tensor.isfinite().all() for tensor in (*routing, *grads))


def test_strides_do_not_matter_and_inputs_stay_as_they_were() -> None:
    states, weight, bias, cu_seqlens, top_k = Case((5, 3), 32, 8, 3).arguments()
    before = [tensor.clone() for tensor in (states, weight, bias, cu_seqlens)]
    strided = torch.stack([states, states], dim=2)[:, :, 1]
    turned = weight.T.contiguous().T
    assert not strided.is_contiguous()
    assert not turned.is_contiguous()
    expected = route_experts(states, weight, bias, cu_seqlens, top_k)
    actual = route_experts(strided, turned, bias, cu_seqlens, top_k)
    assert torch.equal(actual.expert, expected.expert)
    torch.testing.assert_close(actual.pooled, expected.pooled, rtol=0, atol=1e-14)
    assert all(torch.equal(now, then) for now, then in zip((states, weight, bias, cu_seqlens), before, strict=True))


def _with(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "states": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "bias": torch.zeros(5),
        "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
        "top_k": 2,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            _with(states=torch.zeros(3, 4, dtype=torch.int64)),
            TypeError,
            "states must be floating point, got torch.int64",
        ),
        (_with(states=torch.zeros(3)), ValueError, r"states must have 2 dimensions, got shape \(3,\)"),
        (_with(weight=torch.zeros(5)), ValueError, r"weight must have 2 dimensions, got shape \(5,\)"),
        (_with(bias=torch.zeros(5, 1)), ValueError, r"bias must have 1 dimensions, got shape \(5, 1\)"),
        (_with(weight=torch.zeros(5, 3)), ValueError, r"must have one width, got \(3, 4\) and \(5, 3\)"),
        (_with(bias=torch.zeros(4)), ValueError, r"bias must have one entry per expert \(5\), got 4"),
        (_with(bias=torch.zeros(5, device="meta")), ValueError, "one device, got states on cpu.*bias on meta"),
        (_with(cu_seqlens=torch.tensor([0, 3])), TypeError, "cu_seqlens must be torch.int32, got torch.int64"),
        (_with(top_k=0), ValueError, "top_k must be between 1 and the number of experts 5, got 0"),
        (_with(top_k=6), ValueError, "top_k must be between 1 and the number of experts 5, got 6"),
        (_with(weighting="sum"), ValueError, "weighting must be one of softmax, renormalize, got 'sum'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^route_experts: .*{message}"):
        route_experts(**arguments)
