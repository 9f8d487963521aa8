"""Querying transformer (Q-Former of BLIP-2, Li et al. 2023, section 3.1) over packed states.

Layers are BERT's, normalised after each residual. Layers 0, 2, 4, ... have cross-attention from the queries to a user's
history. Queries and text share the self-attention and have feed-forwards of their own.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laser_fast.lm.attention.meta import attend_without_values
from laser_fast.lm.attention.packed_attention import AttentionPlan, varlen_attention
from laser_fast.nn.evaluation_mode import draws_dropout
from laser_fast.ops.dispatch import dispatch_queries
from laser_fast.ops.prefix_kv import inject_prefix_kv
from laser_fast.ops.segments import cu_seqlens_from_lengths, even_cu_seqlens

_FEED_FORWARD_FACTOR = 4
INITIAL_STD = 0.02  # BERT's


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
            dropout = self.dropout if draws_dropout(self) else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return _add(self, attended.transpose(1, 2).flatten(2), hidden)

    def forward_packed(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        plan: AttentionPlan,
        before: Tensor | None = None,
        before_index: Tensor | None = None,
    ) -> Tensor:
        """Among the rows of each packed sequence, and from them to a group of rows before it: [T, D] -> [T, D].

        Args:
            cu_seqlens: int32 [B+1].
            plan: of these queries and all their keys.
            before: [G, Q, D], groups of rows, which do not see the sequence.
            before_index: int32 [B], the group before each sequence.
        """
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        if before is not None:
            width = hidden.shape[-1]
            both = F.linear(before, self.qkv.weight[width:], self.qkv.bias[width:])
            first_key, first_value = both.unflatten(-1, (2, self.num_heads, -1)).unbind(2)
            key, value, _ = inject_prefix_kv(key, value, first_key, first_value, cu_seqlens, prefix_index=before_index)
        dropout = self.dropout if draws_dropout(self) else 0.0
        attended = varlen_attention(query, key, value, cu_seqlens, causal=plan.causal, dropout=dropout, plan=plan)
        return _add(self, attended.flatten(1), hidden)


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
        """From the queries [M, D], user by user, to the user's packed states [N, D] -> [M, D]."""
        query = self.query(hidden).unflatten(-1, (self.num_heads, -1))
        key, value = self.key_value(states).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        bounds, dropout = (boundaries.queries, boundaries.states), self.dropout if draws_dropout(self) else 0.0
        attended = varlen_attention(query, key, value, *bounds, causal=False, dropout=dropout, plan=boundaries.plan)
        return _add(self, attended.flatten(1), hidden)


class CrossBoundaries:
    """Which rows of the packed states each user's queries may read, planned once for all layers."""

    def __init__(self, cu_seqlens: Tensor, rows_per_user: int | Tensor) -> None:
        """Plan int32 [B+1] over the states, and the rows of queries: one number, or int64 [B] for each user."""
        self.states = cu_seqlens
        if isinstance(rows_per_user, Tensor):
            self.queries = cu_seqlens_from_lengths(rows_per_user)
        else:
            self.queries = even_cu_seqlens(cu_seqlens.shape[0] - 1, rows_per_user, cu_seqlens.device)
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
        return _add(self, F.gelu(self.wide(hidden)), hidden)


def _add(part: _SelfAttention | _CrossAttention | FeedForward, found: Tensor, hidden: Tensor) -> Tensor:
    """The end of every part of a layer: `norm(x + dropout(W y))`."""
    return part.norm(hidden + F.dropout(part.out(found), part.dropout, draws_dropout(part)))


class QFormerLayer(nn.Module):
    """One layer: self-attention, cross-attention where asked, feed-forward of the queries."""

    def __init__(self, width: int, num_heads: int, dropout: float, *, cross_attention: bool) -> None:
        super().__init__()
        self.self_attention = _SelfAttention(width, num_heads, dropout)
        self.cross_attention = _CrossAttention(width, num_heads, dropout) if cross_attention else None
        self.feed_forward = FeedForward(width, dropout)

    def forward(self, hidden: Tensor, states: Tensor, boundaries: CrossBoundaries, self_attention: bool) -> Tensor:
        """The groups of all users, [B*k, Q, D] -> [B*k, Q, D]; the self-attention may have run before."""
        if self_attention:
            hidden = self.self_attention(hidden)
        if self.cross_attention is not None:
            hidden = self.cross_attention(hidden.flatten(0, 1), states, boundaries).view(hidden.shape)
        return self.feed_forward(hidden)


class QFormer(nn.Module):
    """The querying transformer: `Y = QFormer(T[e_b] ; X)` for all users and all chosen experts in one batch.

    Args:
        width: D, a multiple of `num_heads`.
        dropout: on embeddings, attention probabilities and residual branches.
        recompute: keep only the inputs of the layers for backward, which computes each layer again.
    """

    def __init__(
        self, width: int, num_layers: int, num_heads: int, *, dropout: float = 0.1, recompute: bool = False
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
            QFormerLayer(width, num_heads, dropout, cross_attention=index % 2 == 0) for index in range(num_layers)
        )
        self.apply(initialize_like_bert)

    def forward(
        self,
        queries: Tensor,
        expert: Tensor,
        states: Tensor,
        cu_seqlens: Tensor,
        layer_inputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Let the queries of each user's experts read the user's states.

        Args:
            queries: [E, Q, D], the query tokens of every expert.
            expert: int32 [B, k], the experts of each user.
            states: [N, D], packed.
            cu_seqlens: int32 [B+1].
            layer_inputs: a list to which the input of each layer, [B*k, Q, D], is appended.

        Returns:
            [B*k, Q, D], the k groups of a user one after the other. The groups do not see each other.
        """
        top_k, first = expert.shape[1], self.blocks[0]
        hidden = self.norm(queries)
        # up to the first cross-attention the queries depend on the expert alone, unless dropout draws a mask per user:
        # then E groups pass the first self-attention instead of B*k
        per_expert = queries.shape[0] < expert.numel() and not (draws_dropout(self) and self.dropout)
        if per_expert:
            if layer_inputs is not None:
                layer_inputs.append(dispatch_queries(hidden, expert))
            hidden = first.self_attention(hidden)
        hidden = F.dropout(dispatch_queries(hidden, expert), self.dropout, draws_dropout(self))
        if expert.numel() == 0:
            return hidden
        # the groups of a user read the same states, so they share one projection of keys and values: [B, k*Q, D]
        boundaries = CrossBoundaries(cu_seqlens, top_k * queries.shape[1])
        for layer in self.blocks:
            self_attention = not (per_expert and layer is first)
            if layer_inputs is not None and self_attention:
                layer_inputs.append(hidden)
            hidden = self.run(layer, hidden, states, boundaries, self_attention)
        return hidden

    def run(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """Call a layer, so that backward computes it again where `recompute` says so."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    @property
    def blocks(self) -> list[QFormerLayer]:
        """The layers by their type."""
        return cast("list[QFormerLayer]", list(self.layers))


def initialize_like_bert(module: nn.Module) -> None:
    """Draw the weights of an affine map from N(0, 0.02^2), and zero its bias."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        nn.init.zeros_(module.bias)
