"""The text residual as a recommender: cached text vectors, learned recency weights, one linear head."""

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.nn.evaluation_mode import evaluating
from laser_fast.nn.text_residual import TextResidual
from laser_fast.ops.precision import autocast_off
from laser_fast.recommenders.protocol import check_histories, newest_items, repeat_positions


class TextRecommender:
    """score = cos(R(history), R(item)) / tau, which reads no text; 0 everywhere for an empty history. A `Scorer`.

    Args:
        text: R, with its vectors or their source.
        temperature: tau.
        without_history: give the items of the history the lowest score of all.
    """

    def __init__(self, text: TextResidual, temperature: float, *, without_history: bool = False) -> None:
        if temperature <= 0:
            raise ValueError(f"TextRecommender: temperature must be positive, got {temperature}")
        self.text = text
        self.temperature = temperature
        self.without_history = without_history
        self.num_items = text.num_items

    @torch.no_grad()
    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`: float32 [B, I], on the device of `items`."""
        check_histories("TextRecommender.score", items, cu_seqlens, self.num_items)
        device = self.text.head.weight.device
        read, bounds = newest_items(items, cu_seqlens, self.text.max_history)
        with evaluating(), autocast_off(device):
            users = self.text.users(read.to(device), bounds.to(device))
            scores = F.normalize(users, dim=-1) @ F.normalize(self.text.embeddings(), dim=-1).T / self.temperature
        scores = scores.to(items.device).masked_fill_((cu_seqlens.diff() == 0)[:, None], 0.0)
        if self.without_history:
            scores.view(-1)[repeat_positions(items, cu_seqlens, self.num_items)[0]] = -2.0 / self.temperature
        return scores
