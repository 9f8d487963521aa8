"""RMSNorm with a frozen weight, forward and backward, for autograd functions (formulas: the kernel).

Both are plain functions without a custom op's cost: a step calls them twice a layer, and a compiled frozen layer runs
the forward of its own class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laser_fast.ops.backends import triton_serves
from laser_fast.ops.checks import check_dtype, check_floating, check_one_device
from laser_fast.ops.precision import wide_dtype

MAX_WIDTH = 32768  # a tile of the kernels holds whole rows; wider ones run as the torch reference


@dataclass(frozen=True)
class NormKind:
    """How a model writes its RMSNorm.

    Attributes:
        offset: 1.0 where the stored weight is the deviation from one (Gemma), else 0.0.
        late_weight: the normalised row is rounded to the model's dtype before the weight multiplies it (Llama).
        eps: added under the root.
    """

    offset: float
    late_weight: bool
    eps: float


def rms_norm_reference(x: Tensor, weight: Tensor, kind: NormKind) -> Tensor:
    """The norm in plain differentiable PyTorch; arguments are trusted."""
    return _scale(x, _reciprocal(x, kind), weight, kind)


def rms_norm_forward(
    x: Tensor, weight: Tensor, kind: NormKind, reciprocal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`y = x / sqrt(mean(x^2) + eps) * (offset + w)` over the last dimension, without gradient.

    Float32 arithmetic (float64 stays float64) that rounds where `kind` says.

    Args:
        x: [..., D], floating point; dense rows are not copied.
        weight: [D], floating point.
        reciprocal: what an earlier call returned for x, which gives its y again, bit for bit; None: computed.

    Returns:
        y [..., D] in the dtype of x (late weight: of x and weight together), and the reciprocal [..., 1].

    Raises:
        RuntimeError: x or weight needs a gradient, which no graph would see.
    """
    name = "rms_norm_forward"
    _check(name, x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError(f"{name}: x and weight must need no gradient, got one that does; use an autograd function")
    if reciprocal is not None:
        _check_reciprocal(name, reciprocal, x)
    if x.is_meta:  # what the kernel allocates, so that plans are those of a GPU
        dtype = torch.promote_types(x.dtype, weight.dtype) if kind.late_weight else x.dtype
        given = x.new_empty((*x.shape[:-1], 1), dtype=wide_dtype(x)) if reciprocal is None else reciprocal
        return x.new_empty(x.shape, dtype=dtype), given
    if not _kernel_serves(x, weight):
        reciprocal = _reciprocal(x, kind) if reciprocal is None else reciprocal
        return _scale(x, reciprocal, weight, kind), reciprocal
    from laser_fast.kernels.rms_norm import rms_norm_forward as launch  # triton is needed only on a GPU

    y, reciprocal = launch(x, weight, kind.eps, kind.offset, kind.late_weight, reciprocal)
    return y, reciprocal


def rms_norm_backward(grad: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, kind: NormKind) -> Tensor:
    """Gradient of x, [..., D] in its dtype, from that of y, [..., D]; rounded once, whatever `kind` says."""
    name = "rms_norm_backward"
    _check(name, x, weight)
    check_floating(name, grad=grad)
    if grad.shape != x.shape:
        raise ValueError(f"{name}: grad must have the shape of x {tuple(x.shape)}, got {tuple(grad.shape)}")
    check_one_device(name, x=x, grad=grad)
    _check_reciprocal(name, reciprocal, x)
    if x.is_meta:
        return x.new_empty(x.shape)
    if not _kernel_serves(x, weight):
        rows = x.to(reciprocal.dtype) * reciprocal
        scaled = grad.to(rows.dtype) * (weight.to(rows.dtype) + kind.offset)
        return ((scaled - rows * (scaled * rows).mean(-1, keepdim=True)) * reciprocal).to(x.dtype)
    from laser_fast.kernels.rms_norm import rms_norm_backward as launch

    grad_x: Tensor = launch(grad, x, reciprocal, weight, kind.offset)
    return grad_x


def _reciprocal(x: Tensor, kind: NormKind) -> Tensor:
    return torch.rsqrt(x.to(wide_dtype(x)).square().mean(-1, keepdim=True) + kind.eps)


def _scale(x: Tensor, reciprocal: Tensor, weight: Tensor, kind: NormKind) -> Tensor:
    rows = x.to(reciprocal.dtype) * reciprocal
    if kind.late_weight:
        return weight * rows.to(x.dtype)
    return (rows * (weight.to(rows.dtype) + kind.offset)).to(x.dtype)


def _kernel_serves(x: Tensor, weight: Tensor) -> bool:
    return 0 < x.shape[-1] <= MAX_WIDTH and triton_serves("rms_norm", x, weight)


def _check_reciprocal(name: str, reciprocal: Tensor, x: Tensor) -> None:
    check_dtype(name, wide_dtype(x), reciprocal=reciprocal)
    if reciprocal.shape != (*x.shape[:-1], 1):
        found = tuple(reciprocal.shape)
        raise ValueError(f"{name}: reciprocal must have shape {(*x.shape[:-1], 1)}, got {found}")
    check_one_device(name, x=x, reciprocal=reciprocal)


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"{name}: x and weight must be floating point, got {x.dtype} and {weight.dtype}")
    if not x.dim() or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: weight must have one entry per column of x, got {tuple(weight.shape)} and x {tuple(x.shape)}"
        )
    if x.device != weight.device:
        check_one_device(name, x=x, weight=weight)
