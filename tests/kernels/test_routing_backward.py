"""Backward pass of the routing kernels against autograd through the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from laser_fast.kernels import routing, routing_backward
from laser_fast.kernels.routing import RoutingResult, route_forward
from laser_fast.kernels.routing_backward import route_backward
from laser_fast.ops.routing import WEIGHTINGS, route_experts_reference

from .kernel_cases import DTYPES, ROUTING_CASES, ROUTING_MODES

Make = Callable[..., Any]
Check = Callable[..., None]
NAMES = ("states", "router", "bias")

CASES = [
    *ROUTING_CASES,
    pytest.param((10, 5), 63, 8, 3, id="15-rows-of-63"),
    pytest.param((16, 1), 65, 8, 3, id="17-rows-of-65"),
    pytest.param((20, 11), 127, 8, 3, id="one-short-of-a-tile"),
    pytest.param((33,), 129, 8, 3, id="one-past-a-tile"),
    pytest.param((31, 1, 32, 127), 16, 8, 3, id="one-short-of-and-past-a-users-tile"),
]


class Grads(NamedTuple):
    """Gradients of the differentiable results."""

    weight: Tensor
    pooled: Tensor
    balance: Tensor


def _grads(result: RoutingResult) -> Grads:
    generator = torch.Generator().manual_seed(23)
    tensors = [torch.randn(tensor.shape, generator=generator) for tensor in (result.weight, result.pooled)]
    return Grads(*[tensor.to(result.weight.device) for tensor in tensors], result.weight.new_tensor(3.0))


def _backward(
    inputs: Any,
    result: RoutingResult,
    grads: Grads,
    weighting: str = "softmax",
    *,
    states: bool = True,
    router: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The states' gradient is read back as the operation hands it on."""
    arguments = inputs.states, inputs.router, inputs.cu_seqlens, result
    return route_backward(grads, *arguments, weighting=weighting, needs=(states, router))


def _reference(inputs: Any, result: RoutingResult, grads: Grads, weighting: str, seed: int = 0) -> list[Tensor]:
    """Autograd, for the kernel's own choice; another seed adds up the same numbers in another order."""
    generator = torch.Generator().manual_seed(seed)
    experts, columns = (torch.arange(size) for size in inputs.router.shape)
    if seed:
        experts, columns = (torch.randperm(len(order), generator=generator) for order in (experts, columns))
    experts, columns = experts.to(inputs.states.device), columns.to(inputs.states.device)
    back = experts.argsort(), columns.argsort()
    leaves = [inputs.states[:, columns], inputs.router[experts][:, columns], inputs.bias[experts]]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    decision = back[0][result.expert.long()].int()
    routed = route_experts_reference(*leaves, *inputs[3:], weighting=weighting, expert=decision)
    roots = [routed.weight, routed.pooled, routed.balance_loss]
    seeds = [grads.weight, grads.pooled[:, experts], grads.balance]
    states, router, bias = torch.autograd.grad(
        roots, leaves, [grad.to(root) for grad, root in zip(seeds, roots, strict=True)]
    )
    return [states[:, back[1]], router[back[0]][:, back[1]], bias[back[0]]]


def _check(
    actual: tuple[Tensor, ...], inputs: Any, result: RoutingResult, grads: Grads, weighting: str, check: Check
) -> None:
    exact = _reference(inputs.double(), result, grads, weighting)
    # a row whose terms cancel is as wrong as its rounding has it, so eager is drawn up to ten times
    draw = cache(lambda seed: _reference(inputs, result, grads, weighting, seed))
    for index, (name, one, expected) in enumerate(zip(NAMES, actual, exact, strict=True)):
        check(one, (draw(seed)[index] for seed in range(10)), expected, name)


@pytest.mark.parametrize(("dtype", "weighting"), ROUTING_MODES)
@pytest.mark.parametrize(("lengths", "width", "num_experts", "top_k"), CASES)
def test_as_accurate_as_autograd(
    lengths: tuple[int, ...],
    width: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    weighting: str,
    routing_inputs: Make,
    assert_accurate: Check,
) -> None:
    inputs = routing_inputs(lengths, width, num_experts, top_k, dtype)
    result = route_forward(*inputs, weighting)
    grads = _grads(result)
    _check(_backward(inputs, result, grads, weighting), inputs, result, grads, weighting, assert_accurate)


def _limit(monkeypatch: pytest.MonkeyPatch, max_programs: int) -> None:
    """As many programs as a device of that few multiprocessors would have."""
    monkeypatch.setattr(routing_backward, "_RANGES", 1)
    monkeypatch.setattr(routing_backward, "multiprocessors", lambda device: max_programs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_programs", [1, 3])
def test_programs_that_take_several_tiles(
    max_programs: int,
    dtype: torch.dtype,
    routing_inputs: Make,
    assert_accurate: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _limit(monkeypatch, max_programs)
    assert routing.rows_per_program(109, 32, max_programs) > 32
    inputs = routing_inputs((65, 0, 10, 31, 3), 20, 8, 3, dtype)
    result = route_forward(*inputs, "softmax")
    grads = _grads(result)
    _check(_backward(inputs, result, grads), inputs, result, grads, "softmax", assert_accurate)


def test_few_programs_where_partial_sums_would_be_large(
    routing_inputs: Make, assert_accurate: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing_backward, "_PARTIAL_BYTES", 0)  # at least 16 programs all the same
    inputs = routing_inputs((272, 16), 4, 8, 3)
    result = route_forward(*inputs, "softmax")
    grads = _grads(result)
    _check(_backward(inputs, result, grads), inputs, result, grads, "softmax", assert_accurate)


@pytest.mark.parametrize("root", Grads._fields)
def test_each_result_alone(root: str, routing_inputs: Make, assert_accurate: Check) -> None:
    inputs = routing_inputs((7, 1, 20, 0, 2), 33, 7, 3)
    result = route_forward(*inputs, "renormalize")
    grads = Grads(
        *[grad if name == root else torch.zeros_like(grad) for name, grad in _grads(result)._asdict().items()]
    )
    _check(_backward(inputs, result, grads, "renormalize"), inputs, result, grads, "renormalize", assert_accurate)


@pytest.mark.parametrize("router", [False, True], ids=["no-router", "router"])
@pytest.mark.parametrize("states", [False, True], ids=["no-states", "states"])
@pytest.mark.parametrize("lengths", [(40, 0, 3), (0,)], ids=["items", "no-item"])
def test_what_is_not_needed_is_empty_and_changes_nothing(
    lengths: tuple[int, ...], states: bool, router: bool, routing_inputs: Make
) -> None:
    inputs = routing_inputs(lengths, 70, 7, 3)
    result = route_forward(*inputs, "softmax")
    full = _backward(inputs, result, _grads(result))
    actual = _backward(inputs, result, _grads(result), states=states, router=router)
    for needed, one, other in zip((states, router, True), actual, full, strict=True):
        assert torch.equal(one, other if needed else other.new_empty(0))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_large_magnitudes(weighting: str, routing_inputs: Make, assert_accurate: Check) -> None:
    inputs = routing_inputs((5, 30, 3), 32, 8, 8)
    shifted = inputs._replace(bias=inputs.bias + 1e4)
    result = route_forward(*shifted, weighting)
    grads = _grads(result)
    _check(_backward(shifted, result, grads, weighting), shifted, result, grads, weighting, assert_accurate)
    far = inputs._replace(states=inputs.states * 100, router=inputs.router * 100)
    result = route_forward(*far, weighting)
    assert all(grad.isfinite().all() for grad in _backward(far, result, grads, weighting))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's NumPy remarks on every NaN
def test_a_nan_stays_with_its_user(routing_inputs: Make) -> None:
    inputs = routing_inputs((5, 4, 0, 9), 20, 7, 3)
    broken = inputs._replace(states=inputs.states.clone())
    broken.states[6, 11] = torch.nan
    grads = []
    for given in (inputs, broken):
        result = route_forward(*given, "softmax")
        # the balance loss joins all users, so it is left out
        grads.append(_backward(given, result, _grads(result)._replace(balance=torch.zeros_like(result.balance_loss))))
    others = [*range(5), *range(9, 18)]
    assert torch.equal(grads[0][0][others], grads[1][0][others])
    assert grads[1][0][5:9].isnan().all()
