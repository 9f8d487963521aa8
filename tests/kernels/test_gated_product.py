"""Kernels of the gated product, forward and backward, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from laser_fast.kernels.gated_product import gated_product_backward, gated_product_forward
from laser_fast.ops.gated_product import ACTIVATIONS, gated_product_reference

from .kernel_cases import DTYPES

Check = Callable[..., None]
SHAPES = [
    pytest.param((12, 1), id="width-1"),
    pytest.param((1, 48), id="one-row"),
    pytest.param((0, 48), id="no-row"),
    pytest.param((3, 0), id="no-column"),
    pytest.param((2, 3, 37), id="odd-width"),
    pytest.param((2, 1023), id="one-short-of-a-block"),
    pytest.param((1, 2, 1025), id="one-past-a-block"),
]


class Inputs(NamedTuple):
    """Gate, up and the product's gradient, one shape."""

    gate: Tensor
    up: Tensor
    grad: Tensor


@pytest.fixture
def make(device: torch.device) -> Callable[..., Inputs]:
    def inner(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, halves: bool = False) -> Inputs:
        generator = torch.Generator().manual_seed(7)
        gate, up, grad = (torch.randn(shape, generator=generator).mul_(2.0).to(device, dtype) for _ in range(3))
        if halves:
            gate, up = torch.cat([gate, up], dim=-1).chunk(2, dim=-1)
        return Inputs(gate, up, grad)

    return inner


def _backward(inputs: Inputs, activation: str) -> tuple[Tensor, Tensor]:
    grads = torch.empty_like(inputs.gate).contiguous(), torch.empty_like(inputs.up).contiguous()
    gated_product_backward(inputs.grad, inputs.gate, inputs.up, activation, *grads)
    return grads


def _autograd(inputs: Inputs, activation: str) -> tuple[Tensor, ...]:
    leaves = inputs.gate.detach().requires_grad_(), inputs.up.detach().requires_grad_()
    out = gated_product_reference(*leaves, activation)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_autograd(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype, make: Callable[..., Inputs], assert_accurate: Check
) -> None:
    inputs = make(shape, dtype)
    eager = _autograd(inputs, activation)
    exact = _autograd(Inputs(*[tensor.double() for tensor in inputs]), activation)
    actual = gated_product_forward(inputs.gate, inputs.up, activation), *_backward(inputs, activation)
    for name, *tensors in zip(("product", "gate", "up"), actual, eager, exact, strict=True):
        assert_accurate(*tensors, name)


def test_halves_are_read_where_they_lie(make: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up, grad = make((3, 5, 40), halves=True)

    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError(f"copied {tuple(tensor.shape)}, {tensor.stride()}")

    monkeypatch.setattr(Tensor, "contiguous", refuse)
    gated_product_forward(gate, up, "silu")
    gated_product_backward(grad.clone(), gate, up, "silu", gate, up)


@pytest.mark.parametrize("halves", [False, True], ids=["dense", "halves"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_may_take_the_place_of_gate_and_up(
    activation: str, halves: bool, make: Callable[..., Inputs]
) -> None:
    inputs = make((2, 1030), torch.float16, halves=halves)
    expected = _backward(inputs, activation)
    gated_product_backward(inputs.grad, inputs.gate, inputs.up, activation, inputs.gate, inputs.up)
    assert torch.equal(inputs.gate, expected[0])
    assert torch.equal(inputs.up, expected[1])


def test_both_gradients_go_into_one_tensor(make: Callable[..., Inputs]) -> None:
    inputs = make((2, 3, 37), torch.float16)
    both = torch.full((2, 3, 80), 7.0, dtype=torch.float16, device=inputs.gate.device)
    gated_product_backward(*inputs[2:], *inputs[:2], "gelu", both[..., 1:38], both[..., 40:77])
    expected = _backward(inputs, "gelu")
    assert torch.equal(both[..., 1:38], expected[0])
    assert torch.equal(both[..., 40:77], expected[1])
    assert bool((both[..., [0, 38, 39, 77, 78, 79]] == 7.0).all())  # and nothing beside them


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's NumPy remarks on exp(1e4)
def test_large_magnitudes_are_their_limits(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    largest = torch.finfo(dtype).max
    gate = torch.tensor([[-largest, -1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4, largest]], dtype=dtype, device=device)
    up, grad = torch.full_like(gate, 0.5), torch.full_like(gate, 2.0)
    out = gated_product_forward(gate, up, activation)
    grad_gate, grad_up = _backward(Inputs(gate, up, grad), activation)
    positive, step = gate.clamp_min(0.0), torch.tensor([0.0] * 4 + [0.5] + [1.0] * 4).to(gate)
    # SiLU of -20 is -4e-8; to all digits everything else is 0, or what the identity would give
    for actual, expected in ((out, 0.5 * positive), (grad_gate, step), (grad_up, 2.0 * positive)):
        torch.testing.assert_close(actual, expected[None] if expected.dim() == 1 else expected, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_where_it_is(activation: str, make: Callable[..., Inputs]) -> None:
    inputs = make((2, 50))
    inputs.gate[1, 3] = inputs.up[0, 7] = inputs.grad[1, 20] = torch.nan
    out, grads = gated_product_forward(inputs.gate, inputs.up, activation), _backward(inputs, activation)
    places = {"out": {(0, 7), (1, 3)}, "gate": {(0, 7), (1, 3), (1, 20)}, "up": {(1, 3), (1, 20)}}
    for tensor, expected in zip((out, *grads), places.values(), strict=True):
        assert {tuple(place) for place in tensor.isnan().nonzero().tolist()} == expected
