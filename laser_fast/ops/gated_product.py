"""The product in a gated MLP, `act(gate) * up`, forward and backward, for autograd functions (formulas: the kernel).

Both are plain functions without a custom op's cost: a step calls them in every layer, and a compiled frozen layer runs
the forward of its own class. Backward writes where it is told to; a caller who owns gate and up needs no memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.ops.backends import triton_serves
from laser_fast.ops.checks import check_one_device

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}  # as torch names the two
_aten = torch.ops.aten


def gated_product_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up` in plain differentiable PyTorch; arguments are trusted."""
    return _activated(gate, activation) * up


def gated_product_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up`: [..., F] in the dtype of gate, without gradient.

    On a GPU one pass in float32 that rounds once and gives a dense result; elsewhere as PyTorch has it.

    Args:
        gate, up: [..., F], floating point, one dtype; dense rows (a half of [..., 2 F] has them) are not copied.
        activation: "silu", "gelu_tanh" or "gelu".

    Raises:
        RuntimeError: gate or up needs a gradient, which no graph would see.
    """
    name = "gated_product_forward"
    _check(name, activation, gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        raise RuntimeError(f"{name}: gate and up must need no gradient, got one that does; use an autograd function")
    if gate.is_meta:  # what the kernel allocates, so that plans are those of a GPU
        return gate.new_empty(gate.shape)
    if not triton_serves("gated_product", gate):
        return _activated(gate, activation).mul_(up)
    from laser_fast.kernels.gated_product import gated_product_forward as launch  # triton is needed only on a GPU

    return launch(gate, up, activation)


def gated_product_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, grad_gate: Tensor, grad_up: Tensor
) -> None:
    """Gradients of gate and up, written into `grad_gate` and `grad_up`; nothing is allocated on a GPU.

    Args:
        grad: [..., F], of the product.
        gate, up, activation: as in `gated_product_forward`.
        grad_gate, grad_up: [..., F] in the dtype of gate, with dense rows, overwritten: new tensors, halves of one, or
            gate and up, in this order.
    """
    name = "gated_product_backward"
    _check(name, activation, gate, up, grad, grad_gate, grad_up)
    for output in (grad_gate, grad_up):
        spread = any(stride == 0 and size > 1 for stride, size in zip(output.stride(), output.shape, strict=True))
        if output.numel() and (output.stride(-1) != 1 or spread):
            raise ValueError(f"{name}: grad_gate and grad_up must have dense rows, got strides {output.stride()}")
    if gate.is_meta:
        return
    _refuse_shared(name, grad_gate, {"grad": grad, "up": up, "grad_up": grad_up})
    _refuse_shared(name, grad_up, {"grad": grad, "gate": gate})
    if not triton_serves("gated_product", gate):
        _backward_in_torch(grad, gate, up, activation, grad_gate, grad_up)
        return
    from laser_fast.kernels.gated_product import gated_product_backward as launch

    launch(grad, gate, up, activation, grad_gate, grad_up)


def _backward_in_torch(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, grad_gate: Tensor, grad_up: Tensor
) -> None:
    """Three passes that allocate only what must not be written over gate yet, and a gelu."""
    scaled = torch.empty_like(gate) if grad_gate.data_ptr() == gate.data_ptr() else grad_gate
    torch.mul(grad, up, out=scaled)  # the last that needs up
    if activation == "silu":
        _aten.silu.out(gate, out=grad_up).mul_(grad)
        _aten.silu_backward.grad_input(scaled, gate, grad_input=grad_gate)
    else:
        approximate = _APPROXIMATE[activation]
        # not gelu.out: oneDNN, which serves it, leaves an output that is not contiguous unwritten (torch 2.13)
        torch.mul(F.gelu(gate, approximate=approximate), grad, out=grad_up)
        _aten.gelu_backward.grad_input(scaled, gate, approximate=approximate, grad_input=grad_gate)


def _refuse_shared(name: str, output: Tensor, read: dict[str, Tensor]) -> None:
    """What is read after the first write must begin elsewhere."""
    begin = output.data_ptr()  # 0 where there is no memory
    for other_name, other in read.items():
        if begin and begin == other.data_ptr():
            raise ValueError(
                f"{name}: grad_gate and grad_up must be new, or gate and up in this order, got {other_name} for one"
            )


def _activated(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=_APPROXIMATE[activation])


def _check(name: str, activation: str, gate: Tensor, up: Tensor, *others: Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if gate.dtype != up.dtype or not gate.is_floating_point():
        raise TypeError(f"{name}: gate and up must have one floating-point dtype, got {gate.dtype} and {up.dtype}")
    for other in (up, *others):
        if other.dtype != gate.dtype:
            raise TypeError(f"{name}: all tensors must have one dtype, got {gate.dtype} and {other.dtype}")
        if other.shape != gate.shape:
            raise ValueError(
                f"{name}: all tensors must have one shape, got {tuple(gate.shape)} and {tuple(other.shape)}"
            )
        if other.device != gate.device:
            check_one_device(name, gate=gate, other=other)
