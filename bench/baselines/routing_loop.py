"""Routing in the form of the Laser authors: a padded batch with a mask, and the load counted in a loop of updates.

Two things differ from their code, so that the numbers are those of `route_experts`: the mean of a user is over the
user's items (theirs is over the padded length), and padding has no vote in the load (theirs votes for k experts).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Result = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, pooled, balance loss, expert


def routing_loop(states: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, top_k: int) -> Result:
    """states [B, L, D] and mask [B, L], 1 where there is an item."""
    scores = F.softmax(F.linear(states.to(weight.dtype), weight, bias), dim=-1, dtype=torch.float32)
    scores = scores.clone()
    scores[mask == 0] = 0
    pooled = scores.sum(dim=1) / mask.sum(dim=1, keepdim=True)
    value, expert = torch.topk(pooled, k=top_k, dim=-1)

    probability = scores.sum(dim=(0, 1)) / mask.sum()
    load = torch.zeros_like(probability)
    choice = torch.topk(scores, k=top_k, dim=-1).indices
    for index, count in zip(*torch.unique(choice[mask == 1], return_counts=True), strict=True):
        load[index] += count / mask.sum()
    balance_loss = weight.shape[0] * (probability * load).sum()
    return F.softmax(value, dim=-1), pooled, balance_loss, expert
