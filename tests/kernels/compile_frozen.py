"""Compile the frozen model's kernels as `compile_offline.py` does the others.

`python compile_frozen.py RESULT.json chosen 80 90`
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from compile_offline import main

from laser_fast.kernels import gated_product, rms_norm

_INNER = 14336  # of an 8B Llama
_TOKENS = 32


def _product(activation: str, dtype: torch.dtype, *, joint: bool) -> Callable[[], None]:
    """Forward and backward, of two matrices or of one (Phi-3), whose halves backward fills in place."""

    def run() -> None:
        both = torch.empty(_TOKENS, 2 * _INNER, dtype=dtype)
        gate, up = both.chunk(2, dim=-1)
        if not joint:
            gate, up = gate.contiguous(), up.contiguous()
        out = gated_product.gated_product_forward(gate, up, activation)
        gated_product.gated_product_backward(out, gate, up, activation, gate, up)

    return run


def _norm(width: int, dtype: torch.dtype, *, late_weight: bool) -> Callable[[], None]:
    """Forward, the same again from the reciprocals, and backward."""

    def run() -> None:
        x, weight = torch.empty(_TOKENS, width, dtype=dtype), torch.empty(width, dtype=dtype)
        kind = (1e-6, 0.0 if late_weight else 1.0, late_weight)
        y, reciprocal = rms_norm.rms_norm_forward(x, weight, *kind)
        rms_norm.rms_norm_forward(x, weight, *kind, reciprocal)
        rms_norm.rms_norm_backward(y, x, reciprocal, weight, kind[1])

    return run


def cases() -> dict[str, Callable[[], None]]:
    """Activations, halves of one tensor, and the widths of known models: of a head, of layers, and wider."""
    half, single = torch.bfloat16, torch.float32
    found = {
        "product-silu-bf16": _product("silu", half, joint=False),
        "product-silu-joint-bf16": _product("silu", half, joint=True),
        "product-gelu_tanh-bf16": _product("gelu_tanh", half, joint=True),
        "product-gelu-bf16": _product("gelu", half, joint=True),
        "product-silu-fp32": _product("silu", single, joint=False),
    }
    for width in (128, 4096, 8192, 16384, 32768):
        found[f"norm-{width}-bf16"] = _norm(width, half, late_weight=True)
    found["norm-5120-bf16"] = _norm(5120, half, late_weight=False)
    found["norm-8192-fp32"] = _norm(8192, single, late_weight=False)
    return found


if __name__ == "__main__":
    main(cases)
