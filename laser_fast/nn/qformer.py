"""Querying transformer (Q-Former of BLIP-2, Li et al. 2023, section 3.1) over packed states.

Layers are BERT's (normalisation after each residual), with cross-attention from the queries to a user's history in
every `cross_attention_freq`-th layer. Queries and text share the self-attention and have feed-forwards of their own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laser_fast.nn.attention import AttentionPlan, varlen_attention
from laser_fast.nn.attention_meta import attend_without_values
from laser_fast.ops.dispatch import dispatch_queries

_FEED_FORWARD_FACTOR = 4
_INITIAL_STD = 0.02  # BERT's


class _SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """Among the queries of each group: [G, Q, D] -> [G, Q, D]."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if hidden.is_meta:
            attended = attend_without_values(query, key, value)
        else:
            dropout = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self._add(attended.transpose(1, 2).flatten(2), hidden)

    def forward_packed(self, hidden: Tensor, cu_seqlens: Tensor, plan: AttentionPlan) -> Tensor:
        """Among the tokens of each packed text: [T, D] -> [T, D]."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        dropout = self.dropout if self.training else 0.0
        attended = varlen_attention(query, key, value, cu_seqlens, causal=False, dropout=dropout, plan=plan)
        return self._add(attended.flatten(1), hidden)

    def _add(self, attended: Tensor, hidden: Tensor) -> Tensor:
        output: Tensor = self.norm(hidden + F.dropout(self.out(attended), self.dropout, self.training))
        return output


class _CrossAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = dropout

    def forward(self, hidden: Tensor, states: Tensor, boundaries: "CrossBoundaries") -> Tensor:
        """From the queries [B, R, D] to the packed states [N, D] of the same user; empty histories add nothing."""
        batch_size, rows, width = hidden.shape
        query = self.query(hidden).view(batch_size * rows, self.num_heads, -1)
        key, value = self.key_value(states).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        attended = varlen_attention(
            query,
            key,
            value,
            boundaries.queries,
            boundaries.states,
            causal=False,
            dropout=self.dropout if self.training else 0.0,
            plan=boundaries.plan,
        )
        projected = F.dropout(self.out(attended.view(batch_size, rows, width)), self.dropout, self.training)
        output: Tensor = self.norm(hidden + projected)
        return output


class CrossBoundaries:
    """Which rows of the packed states each user's queries may read, planned once for all layers."""

    def __init__(self, cu_seqlens: Tensor, rows_per_user: int) -> None:
        self.batch_size = cu_seqlens.shape[0] - 1
        self.states = cu_seqlens
        steps = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device, dtype=torch.int32)
        self.queries = steps * rows_per_user
        self.plan = AttentionPlan(self.queries, cu_seqlens, causal=False)


class FeedForward(nn.Module):
    """`norm(x + W2 gelu(W1 x))`."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.wide = nn.Linear(width, _FEED_FORWARD_FACTOR * width)
        self.out = nn.Linear(_FEED_FORWARD_FACTOR * width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        projected = F.dropout(self.out(F.gelu(self.wide(hidden))), self.dropout, self.training)
        output: Tensor = self.norm(hidden + projected)
        return output


class QFormerLayer(nn.Module):
    """One layer: self-attention, cross-attention where asked, feed-forward of the queries."""

    def __init__(self, width: int, num_heads: int, dropout: float, *, cross_attention: bool) -> None:
        super().__init__()
        self.self_attention = _SelfAttention(width, num_heads, dropout)
        self.cross_attention = _CrossAttention(width, num_heads, dropout) if cross_attention else None
        self.feed_forward = FeedForward(width, dropout)


class QFormer(nn.Module):
    """The querying transformer: `Y = QFormer(T[e_b] ; X)` for all users and all chosen experts in one batch.

    Args:
        width: D.
        num_layers, num_heads: depth, at least 1, and heads; D is a multiple of the heads.
        cross_attention_freq: cross-attention in layers 0, freq, 2*freq, ...
        dropout: on embeddings, attention probabilities and residual branches.
        recompute: let backward compute every layer again from its input instead of keeping what is inside.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        *,
        cross_attention_freq: int = 2,
        dropout: float = 0.1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"QFormer: width must be a multiple of num_heads, got {width} and {num_heads}")
        if num_layers < 1:
            raise ValueError(f"QFormer: num_layers must be at least 1, got {num_layers}")
        self.norm = nn.LayerNorm(width)
        self.dropout = dropout
        self.recompute = recompute
        self.layers = nn.ModuleList(
            QFormerLayer(width, num_heads, dropout, cross_attention=index % cross_attention_freq == 0)
            for index in range(num_layers)
        )
        self.apply(initialize_like_bert)

    def forward(self, queries: Tensor, expert: Tensor, states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Let the queries of each user's experts read the user's states.

        Args:
            queries: [E, Q, D], the query tokens of every expert.
            expert: int32 [B, k], the experts of each user.
            states: [N, D], packed.
            cu_seqlens: int32 [B+1] over the states.

        Returns:
            [B*k, Q, D], the k groups of a user one after the other. The groups do not see each other.
        """
        top_k = expert.shape[1]
        hidden = self.norm(queries)
        # until the first cross-attention the queries depend on the expert alone, unless dropout draws a mask per user:
        # E slabs through the first self-attention instead of B*k
        per_expert = queries.shape[0] < expert.numel() and not (self.training and self.dropout)
        if per_expert:
            hidden = self._first_layer.self_attention(hidden)
        hidden = F.dropout(dispatch_queries(hidden, expert), self.dropout, self.training)
        if expert.numel() == 0:
            return hidden
        # the groups of a user read the same states, so they share one projection of keys and values: [B, k*Q, D]
        boundaries = CrossBoundaries(cu_seqlens, top_k * queries.shape[1])
        for layer in self.layers:
            assert isinstance(layer, QFormerLayer)
            self_attention = not (per_expert and layer is self._first_layer)
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(_run, layer, hidden, states, boundaries, self_attention, use_reentrant=False)
            else:
                hidden = _run(layer, hidden, states, boundaries, self_attention)
        return hidden

    @property
    def _first_layer(self) -> QFormerLayer:
        layer = self.layers[0]
        assert isinstance(layer, QFormerLayer)
        return layer


def _run(
    layer: QFormerLayer, hidden: Tensor, states: Tensor, boundaries: CrossBoundaries, self_attention: bool
) -> Tensor:
    """One layer over the groups of all users: [B*k, Q, D] -> [B*k, Q, D]."""
    if self_attention:
        hidden = layer.self_attention(hidden)
    if layer.cross_attention is not None:
        by_user = hidden.view(boundaries.batch_size, -1, hidden.shape[-1])
        hidden = layer.cross_attention(by_user, states, boundaries).view(hidden.shape)
    output: Tensor = layer.feed_forward(hidden)
    return output


def initialize_like_bert(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=_INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
