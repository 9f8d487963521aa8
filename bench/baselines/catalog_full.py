"""Cross-entropy and top-k over all scores at once: by a broadcast cosine, and by one matrix product."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_broadcast(users: Tensor, items: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`CosineSimilarity` of [B, 1, d] and [1, I, d]: several tensors of B I d elements."""
    scores = F.cosine_similarity(users.unsqueeze(1), items.unsqueeze(0), dim=2)
    return F.cross_entropy(scores / temperature, target)


def cross_entropy_product(users: Tensor, items: Tensor, target: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(F.normalize(users) @ F.normalize(items).T / temperature, target)


def topk_product(users: Tensor, items: Tensor, k: int, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """All scores, a bool mask [B, I], `torch.topk`; no order promised among equals."""
    scores = F.normalize(users) @ F.normalize(items).T
    best = scores.masked_fill(excluded, -torch.inf).topk(k, dim=1)
    return best.values, best.indices
