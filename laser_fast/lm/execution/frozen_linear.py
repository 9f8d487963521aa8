"""Linear maps with frozen weights: `y = x W^T + b`; backward is `grad_x = grad_y W`.

Backward unpacks a weight in 4 bits (bitsandbytes) again. Where a layer is computed again before its backward, one
unpacked copy serves both (`UnpackedWeights`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UnpackedWeights:
    """Unpacked weights of layers that are computed again, kept until their backward takes them."""

    def __init__(self) -> None:
        self.keeping = False  # whether a layer is being computed again
        self._kept: dict[nn.Module, Tensor] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While this is open, every weight that is unpacked stays until `take` fetches it."""
        self._kept.clear()  # a backward that stopped half-way leaves weights behind
        self.keeping = True
        try:
            yield
        finally:
            self.keeping = False

    def unpack(self, module: nn.Module) -> Tensor:
        """The weight for a forward: [out, in], in the dtype it was quantised from."""
        weight = _unpack(module)
        if self.keeping:
            self._kept[module] = weight
        return weight

    def take(self, module: nn.Module) -> Tensor:
        """The weight for a backward, as `unpack` kept it or unpacked now."""
        weight = self._kept.pop(module, None)
        return _unpack(module) if weight is None else weight


def is_packed(module: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes in 4 bits."""
    # only 4-bit weights of bitsandbytes, which need not be imported for this, carry a quant_state
    return isinstance(module, nn.Linear) and getattr(module.weight, "quant_state", None) is not None


def is_frozen_linear(module: nn.Module | None) -> bool:
    """Whether this is a linear layer, plain or in 4 bits, untrained, without hooks and of no subclass (an adapter)."""
    if module is None or not (type(module) is nn.Linear or is_packed(module)):
        return False
    hooked = any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))
    return not hooked and not any(parameter.requires_grad for parameter in module.parameters())


def packed_linear(module: nn.Module, unpacked: UnpackedWeights, x: Tensor) -> Tensor:
    """`x W^T + b` of a layer in 4 bits: [..., in] -> [..., out] in the dtype of x; gradients reach x alone.

    On some CPUs the forward of bitsandbytes repacks the weights at the first call without gradient, into a form that
    has no gradient.
    """
    output: Tensor = _PackedLinear.apply(x, module, unpacked)
    return output


def linear_input_gradient(module: Any, grad: Tensor, unpacked: UnpackedWeights) -> Tensor:
    """`grad_y W`: [..., out] -> [..., in] in the dtype of `grad`."""
    weight = unpacked.take(module) if is_packed(module) else module.weight
    return (grad.to(weight.dtype) @ weight).to(grad.dtype)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, unpacked: UnpackedWeights) -> Tensor:
        ctx.module, ctx.unpacked = module, unpacked
        dtype = module.weight.quant_state.dtype
        inputs = x.to(module.compute_dtype or dtype)
        bias = None if module.bias is None else module.bias.to(inputs.dtype)
        if unpacked.keeping or x.device.type != "cuda":
            with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
                return F.linear(inputs, unpacked.unpack(module).to(inputs.dtype), bias).to(x.dtype)
        from bitsandbytes import matmul_4bit  # knows from how many rows on unpacking first is faster

        return matmul_4bit(inputs, module.weight.data, quant_state=module.weight.quant_state, bias=bias).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return linear_input_gradient(ctx.module, grad_output, ctx.unpacked), None, None


def _unpack(module: Any) -> Tensor:
    state = module.weight.quant_state
    if module.weight.is_meta:
        return torch.empty(state.shape, dtype=state.dtype, device="meta")
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(module.weight.data, state)
    return weight
