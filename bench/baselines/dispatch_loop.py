"""Dispatch and combine as loops over users and choices, and as plain indexing and einsum."""

from __future__ import annotations

import torch
from torch import Tensor


def dispatch_loop(queries: Tensor, expert: list[list[int]]) -> Tensor:
    """A list of query matrices, picked one by one."""
    slabs = queries.unbind(0)
    return torch.stack([slabs[index] for row in expert for index in row])


def dispatch_indexing(queries: Tensor, expert: Tensor) -> Tensor:
    return queries[expert.flatten().long()]


def combine_loop(outputs: Tensor, weight: Tensor) -> Tensor:
    """One choice of one user at a time."""
    num_users, top_k = weight.shape
    combined = []
    for user in range(num_users):
        total = torch.zeros_like(outputs[0])
        for choice in range(top_k):
            total = total + weight[user, choice] * outputs[user * top_k + choice]
        combined.append(total)
    return torch.stack(combined)


def combine_einsum(outputs: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bk,bkqd->bqd", weight, outputs.view(*weight.shape, *outputs.shape[1:]))
