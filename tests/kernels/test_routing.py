"""Forward pass of the routing kernels against the reference in float64, at the edges of tiles, batches and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

import triton
import triton.language as tl

from laser_fast.kernels import routing
from laser_fast.kernels.routing import RoutingResult, _split, route_forward
from laser_fast.ops.routing import WEIGHTINGS, Routing, route_experts_reference

from .kernel_cases import DTYPES, ROUTING_CASES, ROUTING_MODES

Make = Callable[..., Any]
Check = Callable[..., None]

CASES = [
    *ROUTING_CASES,
    pytest.param((15,), 127, 8, 3, id="one-short-of-a-tile"),
    pytest.param((10, 6), 128, 8, 3, id="a-tile"),
    pytest.param((16, 1), 129, 8, 3, id="one-past-a-tile"),
    pytest.param((31, 1, 33, 32, 127), 16, 8, 3, id="one-short-of-and-past-a-users-tile"),
]


def _forward(inputs: Any, weighting: str = "softmax") -> RoutingResult:
    return route_forward(*inputs, weighting)


def _reference(inputs: Any, weighting: str, expert: Tensor | None = None) -> Routing:
    return route_experts_reference(*inputs, weighting=weighting, expert=expert)


def _check_choice(expert: Tensor, scores: Tensor, tolerance: float = 1e-5) -> None:
    """By rank: the chosen score is the best left up to `tolerance`, and the expert is the one where none is near."""
    ordered, indices = scores.sort(dim=1, descending=True, stable=True)
    chosen = scores.gather(1, expert.long())
    top_k = expert.shape[1]
    assert (chosen - ordered[:, :top_k]).abs().le(tolerance).all()
    assert all(len(set(row)) == top_k for row in expert.tolist())
    apart = F.pad(ordered[:, :-1] - ordered[:, 1:], (1, 1), value=torch.inf)
    clear = (apart[:, :top_k] > tolerance) & (apart[:, 1 : top_k + 1] > tolerance)
    assert torch.equal(expert[clear], indices[:, :top_k].int()[clear])


def _check(result: RoutingResult, inputs: Any, weighting: str, assert_accurate: Check) -> None:
    """All results, given the kernel's own choice, which is judged by itself."""
    exact = _reference(inputs.double(), weighting, result.expert)
    eager = _reference(inputs, weighting, result.expert)
    wide = [tensor.float() for tensor in inputs[:3]]
    assert result.expert.dtype == torch.int32
    _check_choice(result.expert, exact.pooled)
    for name in ("weight", "pooled", "load"):
        assert_accurate(getattr(result, name), getattr(eager, name), getattr(exact, name), name)
    probability, exact_probability = (F.linear(*given).softmax(dim=1) for given in (wide, inputs.double()[:3]))
    assert_accurate(result.probability, probability, exact_probability, "probability")
    # one number, on which eager may be right by luck: of a dozen roundings between positive terms, three more eps
    loss, eager_loss, exact_loss = (float(routing.balance_loss) for routing in (result, eager, exact))
    limit = 2 * abs(eager_loss - exact_loss) + 4 * torch.finfo(torch.float32).eps * exact_loss
    assert abs(loss - exact_loss) <= limit


@pytest.mark.parametrize(("dtype", "weighting"), ROUTING_MODES)
@pytest.mark.parametrize(("lengths", "width", "num_experts", "top_k"), CASES)
def test_as_accurate_as_the_reference(
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
    _check(_forward(inputs, weighting), inputs, weighting, assert_accurate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "width"),
    [
        pytest.param((40, 23), 63, id="one-short"),
        pytest.param((64,), 64, id="one"),
        pytest.param((60, 5), 65, id="one-past"),
    ],
)
def test_tile_of_large_batches(
    lengths: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    routing_inputs: Make,
    assert_accurate: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "SMALL_BATCH", 0)
    inputs = routing_inputs(lengths, width, 8, 3, dtype)
    assert routing.item_options("route_items", inputs.states, 8, "many")["BLOCK_N"] == 32
    _check(_forward(inputs), inputs, "softmax", assert_accurate)


def _limit(monkeypatch: pytest.MonkeyPatch, max_programs: int) -> None:
    """As many programs as a device of that few multiprocessors would have."""
    monkeypatch.setattr(routing, "_PROGRAMS", 1)
    monkeypatch.setattr(routing, "multiprocessors", lambda device: max_programs)


@pytest.mark.parametrize("max_programs", [1, 3])
def test_programs_that_take_several_tiles(
    max_programs: int, routing_inputs: Make, assert_accurate: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = routing_inputs((65, 0, 10, 31, 3), 20, 8, 3)
    one_tile_each = _forward(inputs)
    _limit(monkeypatch, max_programs)
    assert routing.rows_per_program(109, 16, max_programs) > 16
    result = _forward(inputs)
    _check(result, inputs, "softmax", assert_accurate)
    for name in ("weight", "pooled", "expert", "probability"):  # per item and user nothing is added up otherwise
        assert torch.equal(getattr(result, name), getattr(one_tile_each, name)), name


def test_half_precision_router(routing_inputs: Make, assert_accurate: Check) -> None:
    inputs = routing_inputs((5, 9), 40, 7, 3, torch.float16)
    inputs = inputs._replace(router=inputs.router.half(), bias=inputs.bias.half())
    _check(_forward(inputs), inputs, "softmax", assert_accurate)


@triton.jit
def _split_kernel(values_ptr, high_ptr, low_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    high, low = _split(tl.load(values_ptr + offsets))
    tl.store(high_ptr + offsets, high)
    tl.store(low_ptr + offsets, low)


def test_split_into_two_tf32_parts_is_exact(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4096, generator=generator) * torch.logspace(-30, 30, 4096)
    edges = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-23, 2 - 2**-23, -(1 + 2**-11), 3.4e38, 1.2e-38])
    values[: len(edges)] = edges
    values = values.to(device)
    high, low = torch.empty_like(values), torch.empty_like(values)
    _split_kernel[(1,)](values, high, low, BLOCK=4096)
    # 24 significant bits, the first implicit: where the last 13 are zero, 11 are left, as TF32 has
    assert (high.view(torch.int32) & 0x1FFF).eq(0).all()
    assert torch.equal(high.double() + low.double(), values.double())
    assert (low.abs() <= high.abs() * 2**-10).all()


def test_a_router_cut_to_tf32_would_break_the_rule(routing_inputs: Make, worst_row_error: Any) -> None:
    inputs = routing_inputs((40, 23), 256, 8, 3, torch.float16)
    exact, eager = (_reference(given, "softmax").pooled for given in (inputs.double(), inputs))
    limit = 2 * worst_row_error(eager, exact) + torch.finfo(torch.float32).eps
    cut = (inputs.router.view(torch.int32) & -8192).view(torch.float32)
    assert worst_row_error(_forward(inputs).pooled, exact) <= limit
    assert worst_row_error(_forward(inputs._replace(router=cut)).pooled, exact) > 10 * limit


def _towards_zero(exact: Any) -> Any:
    """float64 as float32, cut off."""
    near = exact.astype(np.float32)
    return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


def test_sums_of_tensor_cores_that_round_towards_zero(
    interpreter: Any, routing_inputs: Make, assert_accurate: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_dot(_: Any, left: Any, right: Any, total: Any, *options: Any) -> Any:
        """Eight products of TF32 at a time onto what there is, as `mma.m16n8k8` of a GPU adds them up."""
        summed, (a, b) = total.data, (part.data.astype(np.float32) for part in (left, right))
        for start in range(0, a.shape[1], 8):
            cut = (part.view(np.int32) & -8192 for part in (a[:, start : start + 8], b[start : start + 8]))
            first, second = (part.view(np.float32).astype(np.float64) for part in cut)
            summed = _towards_zero(summed.astype(np.float64) + first @ second)
        return interpreter.TensorHandle(summed, total.dtype.scalar)

    inputs = routing_inputs((40, 23), 768, 8, 3, torch.float16)
    before = _forward(inputs)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    result = _forward(inputs)
    assert not torch.equal(result.probability, before.probability)
    _check(result, inputs, "softmax", assert_accurate)


def _in_parts(tensor: Tensor, bits: int, count: int) -> list[Tensor]:
    """Parts of that many significant bits, rounded to nearest, that add up to the tensor as far as they reach."""
    parts = []
    for _ in range(count):
        mantissa, exponent = torch.frexp(tensor)
        parts.append(torch.ldexp(mantissa.ldexp(torch.tensor(bits)).round().ldexp(torch.tensor(-bits)), exponent))
        tensor = tensor - parts[-1]
    return parts


def _three_products(states: Tensor, router: Tensor, bits: int) -> Tensor:
    """Logits of two parts a factor without the product of the small ones, as tensor cores compute `tf32x3` (11 bits)
    and `bf16x3` (8 bits); added up in float64, for only the parts matter."""
    (high, low), (router_high, router_low) = (_in_parts(tensor, bits, 2) for tensor in (states, router))
    pairs = (high, router_high), (high, router_low), (low, router_high)
    return sum(left.double() @ right.double().T for left, right in pairs)


def test_three_products_of_tf32_hold_the_rule_and_three_of_bfloat16_would_break_it(routing_inputs: Make) -> None:
    inputs = routing_inputs((40, 23), 768, 8, 3)
    exact, eager = (F.linear(*given[:2]) for given in (inputs.double(), inputs))
    limit = 2 * (eager - exact).norm() / exact.norm() + torch.finfo(torch.float32).eps
    errors = [(_three_products(inputs.states, inputs.router, bits) - exact).norm() / exact.norm() for bits in (11, 8)]
    assert errors[0] < limit
    assert errors[1] > 5 * limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_magnitudes(dtype: torch.dtype, routing_inputs: Make, assert_accurate: Check) -> None:
    inputs = routing_inputs((5, 30, 3), 32, 8, 1, dtype)
    inputs = inputs._replace(states=inputs.states * 100, router=inputs.router * 100)
    logits = F.linear(*inputs.double()[:3])
    assert logits.abs().max() > 1e4
    for weighting in WEIGHTINGS:
        result = _forward(inputs, weighting)
        assert all(tensor.isfinite().all() for tensor in result)
        _check(result, inputs, weighting, assert_accurate)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's NumPy remarks on every NaN
def test_a_nan_stays_with_its_user(routing_inputs: Make) -> None:
    inputs = routing_inputs((5, 4, 0, 9), 20, 7, 3)
    clean = _forward(inputs)
    states = inputs.states.clone()
    states[6, 11] = torch.nan
    result = _forward(inputs._replace(states=states))
    others = [0, 2, 3]
    for name in ("weight", "pooled", "expert"):
        assert torch.equal(getattr(result, name)[others], getattr(clean, name)[others]), name
    assert result.pooled[1].isnan().all()
    assert result.expert[1].tolist() == [0, 1, 2]
    assert torch.equal(result.expert, _reference(inputs._replace(states=states), "softmax").expert)
    assert result.load.sum().item() == pytest.approx(3)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_all_equal_experts_are_chosen_in_their_order(top_k: int, routing_inputs: Make) -> None:
    inputs = routing_inputs((20, 0, 3), 6, 8, top_k)
    inputs = inputs._replace(router=torch.zeros_like(inputs.router), bias=torch.zeros_like(inputs.bias))
    result = _forward(inputs)
    assert result.expert.tolist() == [list(range(top_k))] * 3
    assert result.load.tolist() == [1.0] * top_k + [0.0] * (8 - top_k)
    assert result.balance_loss.item() == pytest.approx(top_k)


def test_of_two_copies_of_an_expert_the_lower_comes_first(routing_inputs: Make) -> None:
    inputs = routing_inputs((12, 7, 25), 6, 6, 4)
    # small integers: products and sums are exact, so copies tie exactly
    states, router = (tensor.mul(2).round() for tensor in inputs[:2])
    router = torch.cat([router[:3], router[:3]])
    result = _forward(inputs._replace(states=states, router=router, bias=torch.zeros_like(inputs.bias)))
    assert torch.equal(result.pooled[:, :3], result.pooled[:, 3:])
    for first, copy, second, other in result.expert.tolist():
        assert (copy, other) == (first + 3, second + 3)


def test_near_ties_are_settled_within_the_rounding(routing_inputs: Make) -> None:
    inputs = routing_inputs((30, 11, 4, 1, 50), 24, 8, 3)
    router = inputs.router[:1] + 1e-7 * inputs.router
    inputs = inputs._replace(router=router, bias=torch.zeros_like(inputs.bias))
    result, exact = _forward(inputs), _reference(inputs.double(), "softmax")
    ordered = exact.pooled.sort(dim=1, descending=True).values
    assert (ordered[:, :-1] - ordered[:, 1:]).max() < 1e-6  # nothing but near-ties
    _check_choice(result.expert, exact.pooled, tolerance=1e-6)


@pytest.mark.parametrize(
    "exact_sums",
    [
        pytest.param(True, id="exact-sums"),
        # the host's matrix product, which the interpreter calls, adds up a row by its place in the tile
        pytest.param(False, id="rounded-sums", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_user_is_routed_alone_as_among_others(dtype: torch.dtype, exact_sums: bool, routing_inputs: Make) -> None:
    lengths = (5, 0, 40, 1, 7, 19)
    inputs = routing_inputs(lengths, 150, 8, 3, dtype)
    if exact_sums:
        inputs = inputs._replace(states=inputs.states.round(), router=inputs.router.mul(64).round() / 64)
    together = _forward(inputs)
    rows = inputs.states.split(lengths)
    for user, length in enumerate(lengths):
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=inputs.states.device)
        alone = _forward(inputs._replace(states=rows[user], cu_seqlens=cu_seqlens))
        for name in ("weight", "pooled", "expert"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[user]), (name, user)
