"""Text vectors of the catalogue from a frozen language model, and recommending by them without any training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.data.batches import BatchBuilder
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.nn.text_residual import centred
from laser_fast.ops.precision import autocast_off
from laser_fast.ops.segments import segment_mean, segment_sum
from laser_fast.recommenders.protocol import check_histories


@torch.inference_mode()
def text_vectors(lm: FrozenLM, builder: BatchBuilder, *, batch_size: int = 256) -> Tensor:
    """Mean of the last hidden states over each item's prompt: unit vectors, float32 [I, D_llm]."""
    rows = []
    for batch in builder.item_batches(batch_size):
        hidden = lm(lm.embed(batch.input_ids), batch.token_cu_seqlens)
        rows.append(F.normalize(segment_mean(hidden.float(), batch.token_cu_seqlens), dim=-1))
    return torch.cat(rows).clone()


@dataclass(frozen=True, eq=False)
class CatalogueTexts:
    """The texts of all items, tokenized, with one builder for each of their wordings."""

    builders: Sequence[BatchBuilder]

    def vectors(self, lm: FrozenLM, *, batch_size: int = 64) -> Tensor:
        """Mean of the unit vectors of all wordings, centred: float32 [I, D], unit rows, on the device of `lm`."""
        with torch.inference_mode():
            wordings = [text_vectors(lm, builder, batch_size=batch_size) for builder in self.builders]
            vectors = centred(F.normalize(torch.stack(wordings).sum(dim=0), dim=-1))
        return vectors.clone()  # they enter training steps


class TextSimilarity:
    """score = cos(user, item), user = sum over the history, newest first, of decay^k * item vector. A `Scorer`.

    Args:
        item_vectors: float32 [I, d], unit rows.
        decay: 0 < decay <= 1; 0 stands for the last item alone. An empty history scores 0 everywhere.
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
