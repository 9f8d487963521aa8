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
_FORMS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))  # the second: both in one matrix


def recognise_gated_mlp(module: nn.Module) -> str | None:
    """The activation of a module that computes a gated MLP, found by trying it on random rows.

    Gate and up may be two linear layers or one (Phi-3, GLM). Of an MLP on the meta device a small one with random
    weights is tried on the CPU.

    Returns:
        "silu", "gelu_tanh", "gelu", or "other" (differentiated by autograd); None where the module is no gated MLP.
    """
    names: tuple[str, ...] = next((form for form in _FORMS if hasattr(module, form[0])), ())
    layers: list[Any] = [getattr(module, name, None) for name in names]
    act = activation_of(module)
    if act is None or not layers or not all(is_frozen_linear(layer) for layer in layers):
        return None
    if len(list(module.parameters())) != sum(len(list(layer.parameters())) for layer in layers):
        return None
    tried: Any = _tryable(module, names)
    first = getattr(tried, names[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, first.in_features, generator=generator)
    x = x.to(first.weight.device, torch.float32 if is_packed(first) else first.weight.dtype)
    with torch.no_grad():
        expected = tried(x)
        gate, up = _gate_and_up(tried, x)
        actual = tried.down_proj(act(gate) * up)
    same = torch.allclose(actual, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    return _name_of(act) if same else None


def activation_of(module: nn.Module) -> Activation | None:
    """The activation function that an MLP holds."""
    act: Activation | None = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    return act


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
    gate, up = _gate_and_up(module, x)
    return module.down_proj(_GatedProduct.apply(gate, up, activation, activation_of(module)))


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
        ctx.function = activation_of(module)
        ctx.recipe = None if recipe is None else (recipe.weight, recipe.kind)
        if recipe is None:
            ctx.save_for_backward(x)
        else:
            ctx.save_for_backward(recipe.x, recipe.reciprocal)
        gate, up = _gate_and_up(module, x)
        return _product(activation, ctx.function, gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        x, module, unpacked = ctx.saved_tensors[0], ctx.module, ctx.unpacked
        if ctx.recipe is not None:
            x = NormRecipe(x, ctx.saved_tensors[1], *ctx.recipe).output()
        with unpacked.kept():
            gate, up = _gate_and_up(module, x)
        del x
        grads = _product_backward(ctx.activation, ctx.function, gate, up, grad, may_overwrite=True)
        del gate, up
        if hasattr(module, "gate_up_proj"):
            grad_x = linear_input_gradient(module.gate_up_proj, torch.cat(grads, dim=-1), unpacked)
        else:
            grad_x = linear_input_gradient(module.gate_proj, grads[0], unpacked)
            grad_x.add_(linear_input_gradient(module.up_proj, grads[1], unpacked))
        return grad_x, None, None, None, None


def _gate_and_up(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(module, "gate_up_proj"):
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up
    return module.gate_proj(x), module.up_proj(x)


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


def _name_of(function: Activation) -> str:
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


def _tryable(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The module itself, or a small one of its kind on the CPU where it is on the meta device."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return module
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    with torch.random.fork_rng(devices=[]):
        for name in names:
            inner = 2 * _TWIN_INNER if name == "gate_up_proj" else _TWIN_INNER
            sizes = (_TWIN_INNER, _TWIN_WIDTH) if name == "down_proj" else (_TWIN_WIDTH, inner)
            twin._modules[name] = nn.Linear(*sizes, bias=False, device="cpu")
    return twin
