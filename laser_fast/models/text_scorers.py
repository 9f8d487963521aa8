"""Text vectors of the catalogue from a frozen language model, and two scorers that read nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.data.batches import BatchBuilder
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.nn.evaluation_mode import evaluating
from laser_fast.nn.text_residual import TextResidual, centred
from laser_fast.ops.precision import autocast_off
from laser_fast.ops.segments import segment_mean, segment_sum
from laser_fast.recommenders.protocol import check_histories, newest_items, repeat_positions


@torch.inference_mode()
def text_vectors(lm: FrozenLM, builder: BatchBuilder, *, batch_size: int = 256) -> Tensor:
    """Mean of the last hidden states over each item's prompt, as unit vectors: float32 [I, D_llm]."""
    rows = []
    for batch in builder.item_batches(batch_size):
        hidden = lm(lm.embed(batch.input_ids), batch.token_cu_seqlens)
        rows.append(F.normalize(segment_mean(hidden.float(), batch.token_cu_seqlens), dim=-1))
    return torch.cat(rows).clone()


@dataclass(frozen=True, eq=False)
class CatalogueTexts:
    """The tokenized texts of all items, one builder for each wording."""

    builders: Sequence[BatchBuilder]

    def vectors(self, lm: FrozenLM, *, batch_size: int = 64) -> Tensor:
        """Mean of the vectors of all wordings, centred: float32 [I, D], unit rows, on the device of `lm`."""
        with torch.inference_mode():
            wordings = [text_vectors(lm, builder, batch_size=batch_size) for builder in self.builders]
            vectors = centred(F.normalize(torch.stack(wordings).sum(dim=0), dim=-1))
        return vectors.clone()  # no inference tensor: they enter training steps


class TextSimilarity:
    """score = cos(sum_k decay^k x_{h_k}, x_item), h_0 the newest item; 0 everywhere for an empty history. A `Scorer`.

    Args:
        item_vectors: x, float32 [I, d], unit rows.
        decay: from 0 (the last item alone) to 1.
    """

    def __init__(self, item_vectors: Tensor, decay: float = 0.0) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"TextSimilarity: decay must be from 0 to 1, got {decay}")
        self.item_vectors = item_vectors
        self.num_items = item_vectors.shape[0]
        self.decay = decay

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`: float32 [B, I]."""
        check_histories("TextSimilarity.score", items, cu_seqlens, self.num_items)
        lengths = cu_seqlens.diff().long()
        age = cu_seqlens[1:].long().repeat_interleave(lengths, output_size=items.shape[0])
        age = age - 1 - torch.arange(items.shape[0], device=items.device)
        weight = torch.pow(torch.tensor(self.decay, device=items.device), age)  # 0 ** 0 = 1: the last item
        users = segment_sum(weight[:, None] * self.item_vectors[items], cu_seqlens)
        with autocast_off(users.device):
            return F.normalize(users, dim=-1) @ self.item_vectors.T


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
