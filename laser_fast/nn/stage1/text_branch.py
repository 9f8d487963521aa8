"""The text branch of the querying transformer (BLIP-2, Li et al. 2023, section 3.1), needed in stage 1 only.

Text goes through the self-attention that the queries use and has feed-forwards of its own. Three masks:

    alone    tokens see each other; the queries are not there                          contrastive term
    beside   queries and tokens see each other                                         matching term
    behind   tokens see the queries and the tokens before; queries see no token        generation term
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laser_fast.lm.attention.packed_attention import AttentionPlan
from laser_fast.nn.qformer import INITIAL_STD, CrossBoundaries, FeedForward, QFormer, QFormerLayer, initialize_like_bert
from laser_fast.ops.host_copies import on_host, to_device
from laser_fast.ops.segments import (
    cu_seqlens_from_lengths,
    lengthened_cu_seqlens,
    lengths_on_host,
    segment_positions,
)


class TextBranch(nn.Module):
    """Embeddings and feed-forwards of the text, around the layers of a querying transformer.

    Args:
        qformer: whose self-attention and cross-attention are used and trained.
        width: D of it.
        embedding_size: width of the token embeddings handed in.
        max_tokens: longest text.
        decodes: build the token that a text `behind` queries begins with.
    """

    def __init__(
        self, qformer: QFormer, width: int, embedding_size: int, *, max_tokens: int, decodes: bool = False
    ) -> None:
        super().__init__()
        self._qformer = [qformer]  # in a list: used here, owned and registered by M-Former
        self.token_projection = nn.Linear(embedding_size, width)
        self.positions = nn.Parameter(torch.randn(max_tokens, width) * INITIAL_STD)
        self.norm = nn.LayerNorm(width)
        self.feed_forwards = nn.ModuleList(FeedForward(width, qformer.dropout) for _ in qformer.layers)
        self.decode_token = nn.Parameter(torch.randn(width) * INITIAL_STD) if decodes else None
        for module in (self.feed_forwards, self.token_projection):
            module.apply(initialize_like_bert)

    def embed(self, token_embeds: Tensor, cu_seqlens: Tensor, *, shifted: bool = False) -> Tensor:
        """What the first layer reads: frozen embeddings of packed texts [T, D_emb], int32 [B+1] -> [T, D].

        With `shifted` the decode token comes in front of every text and its last token is dropped, so that row t stands
        for what is known before token t.
        """
        projected = self.token_projection(token_embeds)
        position = segment_positions(cu_seqlens, token_embeds.shape[0])
        if shifted:
            assert self.decode_token is not None
            projected = torch.where(position[:, None] == 0, self.decode_token.to(projected.dtype), projected.roll(1, 0))
        hidden: Tensor = self.norm(projected + self.positions.index_select(0, position))
        return hidden

    def alone(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Texts without queries, both directions: [T, D] -> [T, D]."""
        plan = AttentionPlan(cu_seqlens, causal=False)
        return self._texts(hidden, cu_seqlens, plan, [None] * len(self.feed_forwards), None)

    def behind(self, hidden: Tensor, cu_seqlens: Tensor, layer_inputs: Sequence[Tensor], group: Tensor) -> Tensor:
        """Texts that go on from queries, causally: [T, D], int32 [B+1] -> [T, D].

        Args:
            layer_inputs: of the queries, [G, Q, D] each (`QFormer.forward`): their keys and values do not depend on
                the text, so the queries' own pass serves.
            group: int32 [B], which group of queries a text goes on from.
        """
        plan = AttentionPlan(cu_seqlens, lengthened_cu_seqlens(cu_seqlens, layer_inputs[0].shape[1]), causal=True)
        return self._texts(hidden, cu_seqlens, plan, layer_inputs, group)

    def _texts(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        plan: AttentionPlan,
        layer_inputs: Sequence[Tensor | None],
        group: Tensor | None,
    ) -> Tensor:
        def run(layer: QFormerLayer, feed_forward: nn.Module, hidden: Tensor, before: Tensor | None) -> Tensor:
            output: Tensor = feed_forward(layer.self_attention.forward_packed(hidden, cu_seqlens, plan, before, group))
            return output

        for layer, feed_forward, before in zip(self._qformer[0].blocks, self.feed_forwards, layer_inputs, strict=True):
            hidden = self._run(run, layer, feed_forward, hidden, before)
        return hidden

    def beside(
        self, hidden: Tensor, cu_seqlens: Tensor, queries: Tensor, states: Tensor, boundaries: CrossBoundaries
    ) -> Tensor:
        """Queries that read a text and a user at once; gives the queries, [G, Q, D].

        Args:
            hidden: [T, D], a text for every group.
            cu_seqlens: int32 [G+1].
            queries: [G, Q, D], as the first layer reads them; groups of a user one after the other.
            states: [N, D], packed.
            boundaries: whose states the queries read.
        """
        joint = _JointRows(cu_seqlens, queries.shape[1])
        plan = AttentionPlan(joint.cu_seqlens, causal=False)

        def run(
            layer: QFormerLayer, feed_forward: nn.Module, rows: Tensor, hidden: Tensor, states: Tensor
        ) -> tuple[Tensor, Tensor]:
            both = layer.self_attention.forward_packed(joint.join(rows, hidden), joint.cu_seqlens, plan)
            rows, hidden = joint.part(both)
            if layer.cross_attention is not None:
                rows = layer.cross_attention(rows, states, boundaries)
            return layer.feed_forward(rows), feed_forward(hidden)

        rows = queries.flatten(0, 1)
        for layer, feed_forward in zip(self._qformer[0].blocks, self.feed_forwards, strict=True):
            rows, hidden = self._run(run, layer, feed_forward, rows, hidden, states)
        return rows.view(queries.shape)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A layer, computed again in backward where the querying transformer is."""
        if self._qformer[0].recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


class _JointRows:
    """Where the rows of every group's queries and of its text stand when the one is put before the other."""

    def __init__(self, cu_seqlens: Tensor, num_queries: int) -> None:
        device, groups = cu_seqlens.device, cu_seqlens.shape[0] - 1
        self.cu_seqlens = lengthened_cu_seqlens(cu_seqlens, num_queries)
        self.queries = (self.cu_seqlens[:-1, None] + torch.arange(num_queries, device=device)).flatten()
        total = sum(lengths_on_host(cu_seqlens))
        before = torch.arange(1, groups + 1, device=device) * num_queries
        before = before.repeat_interleave(cu_seqlens.diff().long(), output_size=total)
        self.text = torch.arange(total, device=device) + before
        self._order = torch.argsort(torch.cat([self.queries, self.text]))

    def join(self, queries: Tensor, text: Tensor) -> Tensor:
        """[G*Q, D] and [T, D] -> [G*Q + T, D]."""
        return torch.cat([queries, text]).index_select(0, self._order)

    def part(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `join`."""
        return joint.index_select(0, self.queries), joint.index_select(0, self.text)


def select_sequences(cu_seqlens: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Packed sequences `which` (int64 [G], repeats allowed): rows int64 [T'] to take, and their int32 [G+1].

    Waits for the device where the host does not know `which`, since the number of rows depends on it.
    """
    host, device = on_host(which), cu_seqlens.device
    chosen = to_device(cu_seqlens_from_lengths(on_host(cu_seqlens).diff().index_select(0, host)), device)
    total = sum(lengths_on_host(chosen))
    starts = cu_seqlens[:-1].long().index_select(0, which)
    rows = starts.repeat_interleave(chosen.diff().long(), output_size=total) + segment_positions(chosen, total)
    return rows, chosen
