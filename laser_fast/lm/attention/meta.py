"""Packed attention on the meta device: what FlashAttention keeps and allocates, for rehearsals that count memory.

Forward keeps query, key, value, output and a float32 per query and head. Backward sums the gradient of the queries in
float32 (Dao 2023, arXiv:2307.08691, section 3.1).
"""

from typing import Any

import torch
from torch import Tensor


def attend_without_values(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[..., Tq, H, d], [..., Tk, H_kv, d] twice -> [..., Tq, H, d]."""
    output: Tensor = _Attention.apply(query, key, value)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output = torch.empty_like(query)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, log_sum_exp = ctx.saved_tensors
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        # alive until the kernel has run: row sums of grad * output, and the accumulator of the query gradient
        workspace = torch.empty_like(log_sum_exp), query.new_empty(query.shape, dtype=torch.float32)
        del grad, workspace
        return grads
