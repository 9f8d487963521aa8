"""Gated MLP with frozen weights: `y = (act(x W_gate^T) * x W_up^T) W_down^T` (Shazeer 2020, arXiv:2002.05202).

Backward to x keeps gate and up alone (the product is made again), or with `recompute` nothing but x: and where x came
from a frozen RMSNorm, not even that, since the norm keeps its own input.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_fast.nn.frozen_linear import UnpackedWeights, is_frozen_linear, is_packed, linear_input_gradient
from laser_fast.nn.frozen_norm import NormRecipe, recipe_of, uses_liger

_PROBE_ROWS = 2
_TWIN_WIDTH, _TWIN_INNER = 16, 24
Activation = Callable[[Tensor], Tensor]
_LAYERS = ("gate_proj", "up_proj", "down_proj")


def recognise_gated_mlp(module: nn.Module) -> str | None:
    """The activation of a module that computes a gated MLP, found by trying it on random rows.

    Of an MLP on the meta device a small one with random weights is tried on the CPU.

    Returns:
        "silu", "gelu_tanh", "gelu", or "other" (differentiated by autograd); None where the module is no gated MLP.
    """
    layers: list[Any] = [getattr(module, name, None) for name in _LAYERS]
    act: Any = getattr(module, "act_fn", None)
    if act is None or not all(is_frozen_linear(layer) for layer in layers):
        return None
    if len(list(module.parameters())) != sum(len(list(layer.parameters())) for layer in layers):
        return None
    tried: Any = _tryable(module)
    weight = tried.gate_proj.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, tried.gate_proj.in_features, generator=generator)
    x = x.to(weight.device, torch.float32 if is_packed(tried.gate_proj) else weight.dtype)
    with torch.no_grad():
        expected = tried(x)
        actual = tried.down_proj(tried.act_fn(tried.gate_proj(x)) * tried.up_proj(x))
    same = torch.allclose(actual, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    return _activation(act) if same else None


def gated_mlp(module: Any, activation: str, unpacked: UnpackedWeights, recompute: bool, x: Tensor) -> Tensor:
    """The MLP: [..., D] -> [..., D]; gradients reach x alone.

    Args:
        module: what `recognise_gated_mlp` recognised.
        activation: as it said.
        recompute: keep neither gate nor up for backward.
    """
    # the down projection keeps nothing and stands outside, so that a recomputation of the layer stops before it
    if recompute:
        return module.down_proj(_RecomputedProduct.apply(x, module, activation, unpacked, recipe_of(x)))
    return module.down_proj(_GatedProduct.apply(module.gate_proj(x), module.up_proj(x), activation, module.act_fn))


class _GatedProduct(torch.autograd.Function):
    """`act(gate) * up`: keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, function: Activation) -> Tensor:
        ctx.activation, ctx.function = activation, function
        ctx.save_for_backward(gate, up)
        return _product(activation, function, gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gate, up = ctx.saved_tensors
        grads = _product_backward(ctx.activation, ctx.function, gate, up, grad, may_overwrite=False)
        return *grads, None, None


class _RecomputedProduct(torch.autograd.Function):
    """`act(x W_gate^T) * x W_up^T`: keeps x, or what the norm in front of it kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, module: Any, activation: str, unpacked: UnpackedWeights, recipe: NormRecipe | None
    ) -> Tensor:
        ctx.module, ctx.activation, ctx.unpacked = module, activation, unpacked
        ctx.recipe = None if recipe is None else (recipe.weight, recipe.kind)
        if recipe is None:
            ctx.save_for_backward(x)
        else:
            ctx.save_for_backward(recipe.x, recipe.reciprocal)
        return _product(activation, module.act_fn, module.gate_proj(x), module.up_proj(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        x, module, unpacked = ctx.saved_tensors[0], ctx.module, ctx.unpacked
        if ctx.recipe is not None:
            x = NormRecipe(x, ctx.saved_tensors[1], *ctx.recipe).output()
        with unpacked.kept():
            gate, up = module.gate_proj(x), module.up_proj(x)
        del x
        grad_gate, grad_up = _product_backward(ctx.activation, module.act_fn, gate, up, grad, may_overwrite=True)
        del gate, up
        grad_x = linear_input_gradient(module.gate_proj, grad_gate, unpacked)
        del grad_gate
        return grad_x.add_(linear_input_gradient(module.up_proj, grad_up, unpacked)), None, None, None, None


def _product(activation: str, function: Activation, gate: Tensor, up: Tensor) -> Tensor:
    if activation == "silu" and uses_liger(gate):
        from liger_kernel.ops.swiglu import swiglu_forward

        return swiglu_forward(gate.contiguous(), up.contiguous())[2]
    if activation == "gelu_tanh" and uses_liger(gate):
        from liger_kernel.ops.geglu import geglu_forward

        return geglu_forward(gate.contiguous(), up.contiguous())[2]
    return function(gate) * up


def _product_backward(
    activation: str, function: Activation, gate: Tensor, up: Tensor, grad: Tensor, *, may_overwrite: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up: each [..., F]."""
    if activation in ("silu", "gelu_tanh") and uses_liger(gate):
        from liger_kernel.ops.geglu import geglu_backward
        from liger_kernel.ops.swiglu import swiglu_backward

        if not may_overwrite:  # these kernels leave their results in gate and up, which belong to the graph here
            gate, up = gate.clone(), up.clone()
        backward = swiglu_backward if activation == "silu" else geglu_backward
        grad_gate, grad_up = backward(gate.contiguous(), up.contiguous(), grad.contiguous())[:2]
        return grad_gate, grad_up
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate=approximate)
        return grad_gate, F.gelu(gate, approximate=approximate).mul_(grad)
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        activated = function(leaf)
        (grad_gate,) = torch.autograd.grad(activated, leaf, grad * up)
    return grad_gate, activated.detach() * grad


def _activation(function: Activation) -> str:
    """The name of the function that gives these values."""
    grid = torch.linspace(-6.0, 6.0, 257)
    known: dict[str, Activation] = {
        "silu": F.silu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu": F.gelu,
    }
    for name, candidate in known.items():
        if torch.allclose(function(grid), candidate(grid), rtol=1e-6, atol=1e-7):
            return name
    return "other"


def _tryable(module: nn.Module) -> nn.Module:
    """The module itself, or a small one of its kind on the CPU where it is on the meta device."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return module
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    with torch.random.fork_rng(devices=[]):
        for name in _LAYERS:
            sizes = (_TWIN_INNER, _TWIN_WIDTH) if name == "down_proj" else (_TWIN_WIDTH, _TWIN_INNER)
            twin._modules[name] = nn.Linear(*sizes, bias=False, device="cpu")
    return twin
