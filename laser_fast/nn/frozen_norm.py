"""RMSNorm with a frozen weight: `y = x / sqrt(mean(x^2) + eps) * (offset + w)` (Zhang & Sennrich 2019, 1910.07467).

Backward keeps x in its own dtype and one float32 per row; Hugging Face's modules keep x in float32 twice. On a GPU
liger-kernel does the arithmetic where it is installed, in one pass each way.
"""

import copy
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_PROBE_ROWS = 3


@dataclass(frozen=True)
class NormKind:
    """How a model writes its RMSNorm.

    Attributes:
        offset: 1.0 where the stored weight is the deviation from one (Gemma), else 0.0.
        late_weight: the normalised row is rounded to the model's dtype before the weight multiplies it (Llama).
        eps: under the root.
    """

    offset: float
    late_weight: bool
    eps: float


@dataclass(frozen=True)
class NormRecipe:
    """From what a normalised tensor can be made again: the row it came from and the reciprocal of its scale."""

    x: Tensor
    reciprocal: Tensor  # float32 [..., 1]
    weight: Tensor
    kind: NormKind

    def output(self) -> Tensor:
        """The normalised tensor, without gradient."""
        return _scale(self.x, self.reciprocal, self.weight, self.kind)


def recognise_norm(module: nn.Module) -> NormKind | None:
    """How this module computes an RMSNorm; None where it computes something else.

    Found by trying a copy of it with random weights on random rows, in float32 and (for where it rounds) in bfloat16.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module) is nn.LayerNorm or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    if len(list(module.parameters())) != 1 or not isinstance(eps, float) or list(module.buffers()):
        return None
    kinds = (NormKind(0.0, True, eps), NormKind(0.0, False, eps), NormKind(1.0, False, eps))
    for kind in kinds:
        if all(_computes(module, kind, dtype) for dtype in (torch.float32, torch.bfloat16)):
            return kind
    return None


def _computes(module: nn.Module, kind: NormKind, dtype: torch.dtype) -> bool:
    twin: Any = copy.deepcopy(module).to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(0)
    width = twin.weight.shape[0]
    with torch.no_grad():
        twin.weight.copy_(torch.randn(width, generator=generator))
        x = (torch.randn(_PROBE_ROWS, width, generator=generator) * 3.0).to(dtype)
        try:
            expected = twin(x)
        except (RuntimeError, TypeError):  # wants something else than rows
            return False
        actual = _scale(x, _reciprocal(x, kind), twin.weight, kind)
    same_form = isinstance(expected, Tensor) and expected.dtype == dtype and expected.shape == actual.shape
    return same_form and torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def frozen_rms_norm(module: Any, kind: NormKind, x: Tensor) -> Tensor:
    """RMSNorm over the last dimension: [..., D] -> [..., D] in the dtype of x; gradients reach x alone.

    The result carries its recipe (`recipe_of`), so that what follows need not keep it.
    """
    y, reciprocal = _FrozenRMSNorm.apply(x, module.weight, kind)
    y.laser_recipe = NormRecipe(x.detach(), reciprocal, module.weight, kind)
    output: Tensor = y
    return output


def recipe_of(tensor: Tensor) -> NormRecipe | None:
    """How `frozen_rms_norm` made this very tensor; None where it did not."""
    recipe: NormRecipe | None = getattr(tensor, "laser_recipe", None)
    return recipe


class _FrozenRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: NormKind) -> tuple[Tensor, Tensor]:
        ctx.kind = kind
        if uses_liger(x):
            from liger_kernel.ops.rms_norm import rms_norm_forward

            casting = "llama" if kind.late_weight else "gemma"
            y, _, reciprocal, *ctx.launch = rms_norm_forward(
                x.contiguous(), weight, kind.eps, kind.offset, casting, False
            )
            reciprocal = reciprocal.view(*x.shape[:-1], 1)
        else:
            reciprocal = _reciprocal(x, kind)
            y = _scale(x, reciprocal, weight, kind)
        ctx.save_for_backward(x, weight, reciprocal)
        ctx.mark_non_differentiable(reciprocal)
        return y, reciprocal

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        x, weight, reciprocal = ctx.saved_tensors
        kind: NormKind = ctx.kind
        if uses_liger(x):
            from liger_kernel.ops.rms_norm import rms_norm_backward

            block_size, num_warps, casting = ctx.launch
            grad_x, _ = rms_norm_backward(
                grad.contiguous(),
                x.reshape(-1, x.shape[-1]),
                weight,
                reciprocal.flatten(),
                kind.offset,
                casting,
                block_size,
                num_warps,
                False,
                False,
                needs_dw=False,
            )
            return grad_x, None, None
        rows = x.to(reciprocal.dtype) * reciprocal
        scaled = grad.to(rows.dtype) * (weight.to(rows.dtype) + kind.offset)
        grad_x = (scaled - rows * (scaled * rows).mean(-1, keepdim=True)) * reciprocal
        return grad_x.to(x.dtype), None, None


def _reciprocal(x: Tensor, kind: NormKind) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + kind.eps)


def _scale(x: Tensor, reciprocal: Tensor, weight: Tensor, kind: NormKind) -> Tensor:
    rows = x.to(reciprocal.dtype) * reciprocal
    if kind.late_weight:
        return weight * rows.to(x.dtype)
    return (rows * (weight.to(rows.dtype) + kind.offset)).to(x.dtype)


@cache
def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def uses_liger(x: Tensor) -> bool:
    """Whether the kernels of liger-kernel take this tensor: on a GPU, where they are installed."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and _has_liger()
