"""Frozen text vectors beside the language model's read-out, for users and items through one trained head.

item i   R(x_i)
user u   R(sum_k a_k x_{h_k}),   a_k = exp(w_age(k)) / sum over the history,   age 0 = the newest item

R is linear and starts as the identity, w starts as a decay: untrained, it is a good text-only recommender.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_fast.nn.evaluation_mode import draws_dropout
from laser_fast.nn.own_lock import OwnLock
from laser_fast.ops.checks import validate_indices
from laser_fast.ops.segments import segment_sum, validate_cu_seqlens

_DECAY = 0.7  # weight of an item relative to the next newer one, before training


class TextResidual(nn.Module):
    """Embeddings of users and items from frozen vectors of the items' texts.

    The vectors are no part of `state_dict`: they are set, or `source` gives them when they are first needed.

    Args:
        num_items: I.
        width: `D_llm`, of the vectors and the embeddings.
        max_history: longest history, in items.
        dropout: on the vectors, before the head.

    Attributes:
        source, source_version: gives the vectors; gives the version of what `source` reads.
    """

    vectors: Tensor  # float32 [I, D], unit rows; [0, D] until they are needed

    def __init__(self, num_items: int, width: int, *, max_history: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_items = num_items
        self.max_history = max_history
        self.dropout = dropout
        self.source: Callable[[], Tensor] | None = None
        self.source_version: Callable[[], int] = int  # always 0
        self._came_from: int | None = None  # version of the source; None for vectors that were set
        self._fetching = OwnLock()
        self.head = identity_map(width)
        self.recency = nn.Parameter(math.log(_DECAY) * torch.arange(max_history, dtype=torch.float32))
        self.register_buffer("vectors", torch.empty(0, width), persistent=False)

    def set_vectors(self, vectors: Tensor) -> None:
        """Replace the vectors by float32 [I, D], as `centred` gives them."""
        expected = (self.num_items, self.head.in_features)
        if tuple(vectors.shape) != expected:
            raise ValueError(f"TextResidual: vectors must have shape {expected}, got {tuple(vectors.shape)}")
        known, self.vectors = self.vectors, vectors.detach().to(self.head.weight.device, torch.float32)
        self._came_from = None
        if known.shape == expected and not (known.is_meta or torch.equal(known, self.vectors)):
            # what was computed from the old vectors is as outdated as after a change of the head
            torch.autograd.graph.increment_version(self.head.weight)

    def fetch_vectors(self) -> Tensor:
        """The frozen vectors, float32 [I, D]; RuntimeError where none were set and there is no source."""
        if self.vectors.shape[0] != self.num_items:
            with self._fetching:
                if self.vectors.shape[0] != self.num_items:  # no other thread was first
                    self._ask_source()
        return self.vectors

    def refresh_vectors(self) -> None:
        """Fetch the vectors, again if the version of their source has changed."""
        self.fetch_vectors()
        with self._fetching:
            if self._came_from is not None and self._came_from != self.source_version():
                self._ask_source()

    def _ask_source(self) -> None:
        if self.source is None:
            raise RuntimeError("TextResidual: the vectors must be set, got none; call set_vectors")
        version = self.source_version()
        with torch.inference_mode(False):  # the vectors outlive this call and enter training steps
            self.set_vectors(self.source())
        self._came_from = version

    def items(self) -> Tensor:
        """Embeddings of the whole catalogue, float32 [I, D], with gradient, and with dropout while training."""
        return self.head(F.dropout(self.fetch_vectors(), self.dropout, draws_dropout(self)))

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        """Embeddings of the whole catalogue, float32 [I, D], without gradient or dropout."""
        return self.head(self.fetch_vectors())

    def users(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Embeddings of histories, float32 [B, D], with gradient; an empty history gets the bias of the head.

        Args:
            items: int64 [N], oldest first, each history at most `max_history` long.
            cu_seqlens: int32 [B+1].
        """
        validate_cu_seqlens("TextResidual.users", cu_seqlens, items.shape[0])
        validate_indices("TextResidual.users", "items", items, self.num_items)
        lengths = cu_seqlens.diff().long()
        ends = cu_seqlens[1:].long().repeat_interleave(lengths, output_size=items.shape[0])
        age = ends - 1 - torch.arange(items.shape[0], device=items.device)
        weight = (self.recency - self.recency.max()).exp()[age]
        total = segment_sum(weight, cu_seqlens).clamp_min(torch.finfo(torch.float32).tiny)
        mean = segment_sum(weight[:, None] * self.fetch_vectors()[items], cu_seqlens) / total[:, None]
        return self.head(F.dropout(mean, self.dropout, draws_dropout(self)))


def centred(vectors: Tensor) -> Tensor:
    """Rows minus their mean, scaled to length 1: float32 [I, D] -> [I, D]; a row that equals the mean becomes 0.

    The hidden states of a language model lie in a narrow cone, where all cosines are near 1.
    """
    return F.normalize(vectors - vectors.mean(dim=0, keepdim=True), dim=-1)


def identity_map(width: int) -> nn.Linear:
    """A trained linear map of vectors [..., width] that starts as the identity."""
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
