"""Routing in packed plain PyTorch, without a loop over users: what one would write without a kernel."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Result = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, pooled, balance loss, expert


def mean_index_add(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Per user, by atomics on a GPU."""
    lengths = cu_seqlens.diff()
    user = torch.repeat_interleave(lengths, output_size=values.shape[0])
    total = values.new_zeros(lengths.shape[0], values.shape[1]).index_add(0, user, values)
    return total / lengths.unsqueeze(1)


def mean_segment_reduce(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Per user, one thread a column on a GPU."""
    total = torch.segment_reduce(values, "sum", offsets=cu_seqlens, axis=0, unsafe=True)
    return total / cu_seqlens.diff().unsqueeze(1)


def _scores(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(states.to(weight.dtype), weight, bias).softmax(dim=1)


def routing_topk(states: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, top_k: int) -> Result:
    """`topk` for users and items, counts by `one_hot`."""
    scores = _scores(states, weight, bias)
    pooled = mean_index_add(scores, cu_seqlens)
    value, expert = pooled.topk(top_k, dim=1)
    choice = F.one_hot(scores.topk(top_k, dim=1).indices, weight.shape[0])
    load = choice.sum(dim=(0, 1)) / scores.shape[0]
    return value.softmax(dim=1), pooled, weight.shape[0] * torch.dot(scores.mean(dim=0), load), expert


def _rounds_of_max(values: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k largest of a row by k rounds of `max`: their indices, and the values with -inf in their place."""
    chosen = []
    for _ in range(top_k):
        index = values.max(dim=1, keepdim=True).indices
        values = values.scatter(1, index, -torch.inf)
        chosen.append(index)
    return torch.cat(chosen, dim=1), values


def routing_rounds(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    top_k: int,
    mean: Callable[[Tensor, Tensor], Tensor],
) -> Result:
    """k rounds of `max` in place of `topk`, counts from what they struck out: the strongest eager form."""
    scores = _scores(states, weight, bias)
    pooled = mean(scores, cu_seqlens)
    expert = _rounds_of_max(pooled.detach(), top_k)[0]
    load = (_rounds_of_max(scores.detach(), top_k)[1] == -torch.inf).sum(dim=0) / scores.shape[0]
    balance_loss = weight.shape[0] * torch.dot(scores.mean(dim=0), load)
    return pooled.gather(1, expert).softmax(dim=1), pooled, balance_loss, expert
