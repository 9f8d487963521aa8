"""RMSNorm with a frozen weight: `y = x / sqrt(mean(x^2) + eps) * (offset + w)` (Zhang & Sennrich 2019, 1910.07467).

Backward keeps x in its own dtype and one float32 per row; Hugging Face's modules keep x in float32 twice.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laser_fast.lm.execution.recognition import random_copy
from laser_fast.ops.rms_norm import NormKind, rms_norm_backward, rms_norm_forward, rms_norm_reference

_PROBE_ROWS = 3


@dataclass(frozen=True)
class NormRecipe:
    """From what a normalised tensor can be made again."""

    x: Tensor
    reciprocal: Tensor  # of the scales of the rows, float32 [..., 1]
    weight: Tensor
    kind: NormKind

    def output(self) -> Tensor:
        """The normalised tensor, without gradient."""
        with torch.no_grad():
            return rms_norm_forward(self.x, self.weight, self.kind, self.reciprocal)[0]


def recognise_norm(module: nn.Module) -> NormKind | None:
    """How this module computes an RMSNorm; None where it computes something else.

    A copy with random weights is tried in float32 and in bfloat16, which shows where it rounds.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module) is nn.LayerNorm or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    if len(list(module.parameters())) != 1 or not isinstance(eps, float) or list(module.buffers()):
        return None
    kinds = [NormKind(0.0, True, eps), NormKind(0.0, False, eps), NormKind(1.0, False, eps)]
    rows = 3.0 * torch.randn(_PROBE_ROWS, len(weight), generator=torch.Generator().manual_seed(1), device="cpu")
    for dtype in (torch.float32, torch.bfloat16):
        twin, x = random_copy(module).to(dtype), rows.to(dtype)
        try:
            with torch.no_grad():
                expected = twin(x)
        except (RuntimeError, TypeError):  # wants something else than rows
            return None
        if not isinstance(expected, Tensor) or expected.dtype != dtype or expected.shape != x.shape:
            return None
        outputs = [(kind, rms_norm_reference(x, twin.weight.detach(), kind)) for kind in kinds]
        kinds = [kind for kind, output in outputs if torch.allclose(output, expected, rtol=1e-5, atol=1e-6)]
    return kinds[0] if kinds else None


def frozen_rms_norm(module: Any, kind: NormKind, x: Tensor) -> Tensor:
    """RMSNorm over the last dimension: [..., D] -> [..., D] in the dtype of x; gradients reach x alone.

    Where there may be a backward the result carries its recipe (`recipe_of`), so that what follows need not keep it.
    """
    y, reciprocal = _FrozenRMSNorm.apply(x, module.weight, kind)
    if torch.is_grad_enabled() and not y.is_inference():
        y.laser_recipe = NormRecipe(x.detach(), reciprocal, module.weight, kind), y._version
    return y


def recipe_of(tensor: Tensor) -> NormRecipe | None:
    """How `frozen_rms_norm` made this tensor; None where it did not, or where the tensor was written to since."""
    recipe, version = getattr(tensor, "laser_recipe", (None, None))
    return recipe if recipe is not None and tensor._version == version else None


class _FrozenRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: NormKind) -> tuple[Tensor, Tensor]:
        ctx.kind = kind
        y, reciprocal = rms_norm_forward(x, weight, kind)
        ctx.save_for_backward(x, weight, reciprocal)
        ctx.mark_non_differentiable(reciprocal)
        ctx.set_materialize_grads(False)  # else a launch would fill zeros for it
        return y, reciprocal

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if grad is None or not ctx.needs_input_grad[0]:  # None: queries of a last layer that nobody read
            return None, None, None
        x, weight, reciprocal = ctx.saved_tensors
        return rms_norm_backward(grad, x, reciprocal, weight, ctx.kind), None, None
