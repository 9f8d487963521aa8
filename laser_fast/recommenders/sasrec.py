"""SASRec (Kang and McAuley 2018, arXiv:1808.09781) on packed histories: tied item embeddings, rotary positions."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_fast.lm.attention.packed_attention import AttentionPlan, varlen_attention
from laser_fast.nn.evaluation_mode import draws_dropout
from laser_fast.ops.segments import segment_positions
from laser_fast.recommenders.packed_recommender import PackedRecommender

_ROTARY_BASE = 100.0  # wavelengths from 6 to 600 items: histories have tens of items, not thousands of tokens


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): one pre-norm transformer layer over packed sequences."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, angles: Tensor, cu_seqlens: Tensor, plan: AttentionPlan) -> Tensor:
        query, key, value = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = _rotate(query, angles), _rotate(key, angles)
        probability = self.dropout if draws_dropout(self) else 0.0
        attended = varlen_attention(query, key, value, cu_seqlens, causal=True, dropout=probability, plan=plan)
        hidden = hidden + F.dropout(self.out(attended.flatten(1)), self.dropout, draws_dropout(self))
        return hidden + F.dropout(self.down(F.gelu(self.up(self.mlp_norm(hidden)))), self.dropout, draws_dropout(self))


class SASRec(PackedRecommender):
    """Next-item logits `norm(transformer(e_item)) @ E^T`.

    Queries and keys are rotated by their positions (Su et al. 2021, arXiv:2104.09864): attention sees the distance of
    two items. The paper's learned position embeddings see few histories at late positions and ranked worse on
    validation.
    """

    kind: ClassVar[str] = "sasrec"

    def __init__(
        self,
        num_items: int,
        *,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 50,
        dropout: float = 0.5,
        state_dropout: float = 0.2,
    ) -> None:
        """Draw normal weights of deviation 0.02 from torch's global generator.

        Args:
            width: of the item embeddings and the states, an even multiple of `num_heads`.
            dropout: of the embeddings, attention weights and layer outputs.
            state_dropout: of the states before they meet the item embeddings.
        """
        super().__init__(locals())
        if width % (2 * num_heads):
            raise ValueError(f"SASRec: width must be an even multiple of num_heads, got {width} and {num_heads}")
        self.dropout = dropout
        self.state_dropout = state_dropout
        self.item_embedding = nn.Embedding(num_items, width)
        self.num_heads = num_heads
        self.blocks = nn.ModuleList(_Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = F.dropout(self.item_embedding(items), self.dropout, draws_dropout(self))
        angles = _rotary_angles(cu_seqlens, items.numel(), self.state_size // self.num_heads)
        plan = AttentionPlan(cu_seqlens, causal=True)
        for block in self.blocks:
            hidden = block(hidden, angles, cu_seqlens, plan)
        return F.dropout(self.norm(hidden), self.state_dropout, draws_dropout(self))


def _rotary_angles(cu_seqlens: Tensor, num_items: int, head_size: int) -> Tensor:
    """position * base^(-2i / head_size) with positions from 0 in each history: float32 [N, 1, head_size / 2]."""
    positions = segment_positions(cu_seqlens, num_items)
    steps = torch.arange(0, head_size, 2, device=cu_seqlens.device, dtype=torch.float32) / head_size
    return (positions[:, None] * _ROTARY_BASE**-steps)[:, None]


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) of [N, H, d] by its angle."""
    first, second = heads.chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
