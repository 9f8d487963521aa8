"""SASRec as RecBole and as LLaRA publish it, on packed histories, for their checkpoints (`importers`).

They have learned positions, counted from the oldest item. They are read, not trained, so they have no dropout. Both are
causal, so the padding that the originals put behind a history changes nothing and is left out.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_fast.lm.attention.packed_attention import AttentionPlan, varlen_attention
from laser_fast.ops.segments import segment_positions
from laser_fast.recommenders.packed_recommender import PackedRecommender

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""By RecBole's names; its gelu is the exact one."""


class _Attention(nn.Module):
    """Causal attention of several heads, without a projection behind it."""

    def __init__(self, width: int, num_heads: int, scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, cu_seqlens: Tensor, plan: AttentionPlan) -> Tensor:
        projected = self.query(queries), self.key(keys), self.value(keys)
        query, key, value = (rows.unflatten(-1, (self.num_heads, -1)) for rows in projected)
        return varlen_attention(query, key, value, cu_seqlens, causal=True, scale=self.scale, plan=plan).flatten(1)


class _PostNormLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, width: int, inner_width: int, num_heads: int, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.attention = _Attention(width, num_heads, (width // num_heads) ** -0.5)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.up = nn.Linear(width, inner_width)
        self.down = nn.Linear(inner_width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor, plan: AttentionPlan) -> Tensor:
        attended = self.out(self.attention(hidden, hidden, cu_seqlens, plan))
        hidden = self.attention_norm(attended + hidden)
        return self.mlp_norm(self.down(self.activation(self.up(hidden))) + hidden)


class RecBoleSASRec(PackedRecommender):
    """SASRec of RecBole 1.2: `norm(item + position)`, post-norm layers, tied item embeddings."""

    kind: ClassVar[str] = "recbole-sasrec"

    def __init__(
        self,
        num_items: int,
        *,
        width: int = 64,
        inner_width: int = 256,
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 50,
        activation: str = "gelu",
        norm_eps: float = 1e-12,
    ) -> None:
        """Random weights; the defaults are RecBole's."""
        super().__init__(locals())
        if activation not in ACTIVATIONS:
            raise ValueError(f"RecBoleSASRec: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.item_embedding = nn.Embedding(num_items, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.layers = nn.ModuleList(
            _PostNormLayer(width, inner_width, num_heads, activation, norm_eps) for _ in range(num_layers)
        )

    def forward(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        positions = self.position_embedding(segment_positions(cu_seqlens, items.numel()))
        hidden: Tensor = self.norm(self.item_embedding(items) + positions)
        plan = AttentionPlan(cu_seqlens, causal=True)
        for layer in self.layers:
            hidden = layer(hidden, cu_seqlens, plan)
        return hidden


class LLaRASASRec(PackedRecommender):
    """SASRec of LLaRA (Liao et al. 2024, arXiv:2312.02445): one layer, scores from an output layer of its own.

    Queries are normalised and keys are not. The attention adds to the normalised queries, is scaled by 1/sqrt(width)
    for any number of heads, and has no projection behind it. The original takes an item for padding where the entries
    of its embedding add up to exactly 0; here it stays an item.
    """

    kind: ClassVar[str] = "llara-sasrec"

    def __init__(self, num_items: int, *, width: int = 64, num_heads: int = 1, max_length: int = 10) -> None:
        """Random weights; the defaults are LLaRA's."""
        super().__init__(locals())
        self.item_embedding = nn.Embedding(num_items, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.query_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, num_heads, width**-0.5)
        self.mlp_input_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, num_items)

    def forward(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        inputs = self.item_embedding(items) + self.position_embedding(segment_positions(cu_seqlens, items.numel()))
        queries = self.query_norm(inputs)
        attended = self.attention(queries, inputs, cu_seqlens, AttentionPlan(cu_seqlens, causal=True))
        hidden = self.mlp_input_norm(attended + queries)
        hidden = self.mlp_norm(self.down(F.relu(self.up(hidden))) + hidden)
        return self.norm(hidden)

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        return self.output.weight, self.output.bias
