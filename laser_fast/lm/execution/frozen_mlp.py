"""Gated MLP with frozen weights: `y = (act(x W_gate^T) * x W_up^T) W_down^T` (Shazeer 2020, arXiv:2002.05202).

Backward keeps gate and up, and makes their product again. With `recompute` it keeps x alone, or where a frozen RMSNorm
made x, only what the norm keeps in any case.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_fast.lm.execution.frozen_linear import UnpackedWeights, linear_input_gradient
from laser_fast.lm.execution.frozen_norm import NormRecipe, recipe_of
from laser_fast.lm.execution.recognition import TWIN_WIDTH, frozen_projections, small_twin
from laser_fast.ops.gated_product import ACTIVATIONS, gated_product_backward, gated_product_forward

_PROBE_ROWS = 2
_FORMS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))  # the second: Phi-3, GLM


def recognise_gated_mlp(module: nn.Module) -> str | None:
    """The activation of a module that computes a gated MLP, found by trying a small twin of it; None for any other.

    It is "silu", "gelu_tanh", "gelu", or "other", which autograd differentiates.
    """
    act = _activation_of(module)
    names = frozen_projections(module, _FORMS)
    if act is None or not names:
        return None
    twin = small_twin(module, names)
    x = torch.randn(_PROBE_ROWS, TWIN_WIDTH, generator=torch.Generator().manual_seed(1), device="cpu")
    with torch.no_grad():
        try:
            expected = twin(x)
        except (RuntimeError, TypeError):  # wants something else than rows
            return None
        gate, up = _halves(_projected(twin, x))
        actual = twin.down_proj(act(gate) * up)
    same = torch.allclose(actual, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    return _name_of(act) if same else None


def gated_mlp(module: Any, activation: str, unpacked: UnpackedWeights, recompute: bool, x: Tensor) -> Tensor:
    """The MLP, whose activation `recognise_gated_mlp` found: [..., D] -> [..., D]; gradients reach x alone."""
    # the down projection keeps nothing and stands outside, so that a recomputation of the layer stops before it
    if recompute:
        return module.down_proj(_RecomputedProduct.apply(x, module, activation, unpacked, recipe_of(x)))
    return module.down_proj(_GatedProduct.apply(activation, module, *_projected(module, x)))


class _GatedProduct(torch.autograd.Function):
    """`act(gate) * up`: keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, activation: str, module: Any, *projected: Tensor) -> Tensor:
        ctx.activation, ctx.module = activation, module
        ctx.save_for_backward(*projected)
        return _product(activation, module, projected)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected = ctx.saved_tensors
        grads = tuple(tensor.new_empty(tensor.shape) for tensor in projected)
        _product_backward(ctx.activation, ctx.module, grad, projected, grads)
        return None, None, *grads


class _RecomputedProduct(torch.autograd.Function):
    """`act(x W_gate^T) * x W_up^T`: keeps x, or what the norm before it keeps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, module: Any, activation: str, unpacked: UnpackedWeights, recipe: NormRecipe | None
    ) -> Tensor:
        ctx.module, ctx.activation, ctx.unpacked = module, activation, unpacked
        ctx.recipe = None if recipe is None else (recipe.weight, recipe.kind)
        ctx.save_for_backward(*([x] if recipe is None else [recipe.x, recipe.reciprocal]))
        return _product(activation, module, _projected(module, x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        x, module, unpacked = ctx.saved_tensors[0], ctx.module, ctx.unpacked
        if ctx.recipe is not None:
            x = NormRecipe(x, ctx.saved_tensors[1], *ctx.recipe).output()
        with unpacked.kept():
            projected = _projected(module, x)
        del x
        # nobody else has gate and up, so their gradients may take their place
        _product_backward(ctx.activation, module, grad, projected, projected)
        if hasattr(module, "gate_up_proj"):
            grad_x = linear_input_gradient(module.gate_up_proj, projected[0], unpacked)
        else:
            grad_x = linear_input_gradient(module.gate_proj, projected[0], unpacked)
            grad_x.add_(linear_input_gradient(module.up_proj, projected[1], unpacked))
        return grad_x, None, None, None, None


def _projected(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Gate and up, [..., F] each, or one [..., 2 F] where one matrix gives both."""
    if hasattr(module, "gate_up_proj"):
        return (module.gate_up_proj(x),)
    return module.gate_proj(x), module.up_proj(x)


def _halves(projected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Gate and up, or their gradients, where they lie."""
    gate, up = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
    return gate, up


def _activation_of(module: nn.Module) -> Any:
    return getattr(module, "act_fn", getattr(module, "activation_fn", None))


def _product(activation: str, module: Any, projected: tuple[Tensor, ...]) -> Tensor:
    gate, up = _halves(projected)
    if activation in ACTIVATIONS:
        return gated_product_forward(gate, up, activation)
    product: Tensor = _activation_of(module)(gate) * up
    return product


def _product_backward(
    activation: str, module: Any, grad: Tensor, projected: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> None:
    """Write the gradients of `projected` to `grads`, which may be the same tensors."""
    (gate, up), (grad_gate, grad_up) = _halves(projected), _halves(grads)
    if activation in ACTIVATIONS:
        gated_product_backward(grad, gate, up, activation, grad_gate, grad_up)
        return
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        activated = _activation_of(module)(leaf)
        (found,) = torch.autograd.grad(activated, leaf, grad * up)
    torch.mul(activated.detach(), grad, out=grad_up)
    grad_gate.copy_(found)


def _name_of(function: Callable[[Tensor], Tensor]) -> str:
    """The name of the function that gives these values."""
    grid = torch.linspace(-6.0, 6.0, 257)
    gelu_tanh = partial(F.gelu, approximate="tanh")
    for name, known in (("silu", F.silu), ("gelu_tanh", gelu_tanh), ("gelu", F.gelu)):
        if torch.allclose(function(grid), known(grid), rtol=1e-6, atol=1e-7):
            return name
    return "other"
