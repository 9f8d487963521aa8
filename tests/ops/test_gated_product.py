"""The gated product as an operation: what runs where, what it writes into, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laser_fast.ops.gated_product import (
    ACTIVATIONS,
    gated_product_backward,
    gated_product_forward,
    gated_product_reference,
)


def _inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 3, 11, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_differentiable(activation: str) -> None:
    gate, up, _ = (tensor.requires_grad_() for tensor in _inputs())
    assert torch.autograd.gradcheck(lambda *leaves: gated_product_reference(*leaves, activation), (gate, up))


@pytest.mark.parametrize("place", ["new", "halves", "inputs", "input-halves"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # each has its own gelu in torch
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_on_a_cpu_are_those_of_autograd_wherever_they_go(
    activation: str, dtype: torch.dtype, place: str
) -> None:
    gate, up, grad = _inputs(dtype)
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    out = gated_product_reference(*leaves, activation)
    expected = torch.autograd.grad(out, leaves, grad)
    assert torch.equal(gated_product_forward(gate, up, activation), out)
    if place == "input-halves":
        gate, up = torch.cat([gate, up], dim=-1).chunk(2, dim=-1)
    both = torch.empty(2, 3, 22, dtype=dtype).chunk(2, dim=-1)
    given = {"new": [torch.empty_like(gate), torch.empty_like(up)], "halves": both}.get(place, [gate, up])
    before = gate.clone(), up.clone()
    gated_product_backward(grad, gate, up, activation, *given)
    for actual, truth in zip(given, expected, strict=True):
        rounding = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(actual, truth, rtol=rounding, atol=rounding)
    if not place.startswith("input"):
        assert torch.equal(gate, before[0])
        assert torch.equal(up, before[1])


def test_without_values_there_is_what_a_gpu_would_allocate() -> None:
    gate, up, grad = (tensor.to("meta") for tensor in _inputs(torch.bfloat16))
    out = gated_product_forward(gate.mT, up.mT, "silu")
    assert (out.shape, out.dtype, out.device.type, out.is_contiguous()) == ((2, 11, 3), torch.bfloat16, "meta", True)
    gated_product_backward(grad, gate, up, "silu", gate, up)


def test_what_does_not_fit_is_refused() -> None:
    gate, up, grad = _inputs(torch.float32)
    with pytest.raises(ValueError, match="gated_product_forward: activation must be one of silu, .*, got 'relu'"):
        gated_product_forward(gate, up, "relu")
    with pytest.raises(TypeError, match=r"must have one floating-point dtype, got torch.float32 and torch.float16"):
        gated_product_forward(gate, up.half(), "silu")
    with pytest.raises(TypeError, match=r"must have one floating-point dtype, got torch.int64 and torch.int64"):
        gated_product_forward(gate.long(), up.long(), "silu")
    with pytest.raises(ValueError, match=r"must have one shape, got \(2, 3, 11\) and \(2, 3, 10\)"):
        gated_product_backward(grad[..., 1:], gate, up, "silu", gate, up)
    with pytest.raises(ValueError, match="on one device, got gate on cpu, other on meta"):
        gated_product_forward(gate, up.to("meta"), "silu")
    with pytest.raises(ValueError, match=r"must have dense rows, got strides \(33, 1, 3\)"):
        gated_product_backward(grad, gate, up, "silu", gate, torch.empty(2, 11, 3).mT)
    with pytest.raises(ValueError, match=r"must have dense rows, got strides \(0, 0, 1\)"):
        gated_product_backward(grad, gate, up, "silu", gate, torch.empty(11).expand(2, 3, 11))
    with pytest.raises(TypeError, match="all tensors must have one dtype, got torch.float32 and torch.float64"):
        gated_product_backward(grad, gate, up, "silu", gate, up.double())
    other = torch.empty_like(gate)
    for places, shared in (
        ((up, gate), "up"),
        ((other, other), "grad_up"),
        ((grad, other), "grad"),
        ((other, gate), "gate"),
    ):
        with pytest.raises(ValueError, match=f"new, or gate and up in this order, got {shared} for one"):
            gated_product_backward(grad, gate, up, "silu", *places)
    with pytest.raises(RuntimeError, match="must need no gradient, got one that does; use an autograd function"):
        gated_product_forward(gate.requires_grad_(), up, "silu")
