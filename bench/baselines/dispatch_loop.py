"""Dispatch and combine in the form of the Laser authors: a loop over choices and users, and a loop over choices."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def dispatch_loop(queries: nn.ParameterList, expert: Tensor) -> list[Tensor]:
    """A list of [1, Q, D], one per expert, picked one by one with a number on the device -> k times [B, Q, D].

    Their code keeps the k groups apart, as here.
    """
    num_users, top_k = expert.shape
    dispatched = []
    for choice in range(top_k):
        picked = []
        for user in range(num_users):
            index = expert[user, choice]
            picked.append(queries[index])
        dispatched.append(torch.cat(picked, dim=0))
    return dispatched


def combine_loop(outputs: Sequence[Tensor], weight: Tensor) -> Tensor:
    """k times [B, Q, D] and [B, k] -> [B, Q, D], one choice after the other, in the dtype of the outputs."""
    total = torch.zeros_like(outputs[0])
    for choice, output in enumerate(outputs):
        total += weight[:, choice, None, None] * output
    return total
