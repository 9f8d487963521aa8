"""Dispatch and combine in plain PyTorch without a loop: indexing, and products with the choice or the weights."""

from typing import Any

import torch
from torch import Tensor


def dispatch_indexing(queries: Tensor, expert: Tensor) -> Tensor:
    """`table[idx]`; backward sorts and adds."""
    return queries[expert.flatten().long()]


def dispatch_index_select(queries: Tensor, expert: Tensor) -> Tensor:
    """Backward adds with atomics on a GPU."""
    return queries.index_select(0, expert.flatten())


class _OneHotBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_experts = queries.shape[0]
        return queries.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        one_hot = torch.arange(ctx.num_experts, device=index.device).unsqueeze(1) == index
        return (one_hot.to(grad.dtype) @ grad.flatten(1)).view(-1, *grad.shape[1:]), None


def dispatch_one_hot(queries: Tensor, expert: Tensor) -> Tensor:
    """Backward is one product with the one-hot choice, [E, B k] by [B k, Q D]: one pass over the gradient."""
    return _OneHotBackward.apply(queries, expert.flatten())


def _by_user(outputs: Tensor, weight: Tensor) -> Tensor:
    return outputs.view(*weight.shape, *outputs.shape[1:])


def combine_einsum(outputs: Tensor, weight: Tensor) -> Tensor:
    """The weights are rounded to the dtype of the outputs: other than `combine_queries` it cannot mix them."""
    return torch.einsum("bk,bkqd->bqd", weight.to(outputs.dtype), _by_user(outputs, weight))


def combine_sum(outputs: Tensor, weight: Tensor) -> Tensor:
    """A product and a sum: two passes, which a compiler fuses into one."""
    return (_by_user(outputs, weight) * weight[:, :, None, None]).sum(dim=1).to(outputs.dtype)
