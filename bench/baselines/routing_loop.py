"""Routing as loops over users and experts, and as packed plain PyTorch with atomics and one_hot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Result = tuple[Tensor, Tensor, Tensor, Tensor]  # expert, weight, pooled, balance loss


def routing_loop(states: Tensor, weight: Tensor, bias: Tensor, lengths: list[int], top_k: int) -> Result:
    """One user, then one expert, at a time."""
    scores = torch.softmax(F.linear(states, weight, bias), dim=1)
    experts, weights, pooled = [], [], []
    for rows in scores.split(lengths):
        mean = rows.mean(dim=0)
        value, index = mean.topk(top_k)
        experts.append(index)
        weights.append(value.softmax(dim=0))
        pooled.append(mean)
    choice = scores.topk(top_k, dim=1).indices
    balance = scores.new_zeros(())
    for expert in range(weight.shape[0]):
        share = (choice == expert).sum() / scores.shape[0]
        balance = balance + scores[:, expert].mean() * share
    return torch.stack(experts), torch.stack(weights), torch.stack(pooled), balance * weight.shape[0]


def routing_packed(states: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, top_k: int) -> Result:
    """No loop; the mean by index_add, the counts by one_hot."""
    num_experts, lengths = weight.shape[0], cu_seqlens.diff()
    scores = torch.softmax(F.linear(states, weight, bias), dim=1)
    user = torch.repeat_interleave(lengths, output_size=states.shape[0])
    total = scores.new_zeros(lengths.shape[0], num_experts).index_add(0, user, scores)
    pooled = total / lengths.unsqueeze(1)
    value, index = pooled.topk(top_k, dim=1)
    choice = F.one_hot(scores.topk(top_k, dim=1).indices, num_experts)
    load = choice.sum(dim=(0, 1)) / scores.shape[0]
    return index, value.softmax(dim=1), pooled, num_experts * (scores.mean(dim=0) * load).sum()
