"""The text branch of the querying transformer (BLIP-2, Li et al. 2023, section 3.1), which stage 1 alone needs.

Text goes through the self-attention of the queries and has feed-forwards of its own. There are three masks:

    alone    tokens see each other; the queries are not there                          contrastive term
    beside   queries and tokens see each other                                         matching term
    behind   tokens see the queries and the tokens before; queries see no token        generation term
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laser_fast.lm.attention.packed_attention import AttentionPlan
from laser_fast.nn.qformer import INITIAL_STD, CrossBoundaries, FeedForward, QFormer, QFormerLayer, initialize_like_bert
from laser_fast.ops.host_copies import on_host, to_device
from laser_fast.ops.segments import (
    cu_seqlens_from_lengths,
    lengthened_cu_seqlens,
    lengths_on_host,
    segment_ids,
    segment_positions,
)


class TextBranch(nn.Module):
    """Embeddings and feed-forwards of the text, around the layers of a querying transformer.

    Args:
        qformer: whose self-attention and cross-attention are used and trained.
        width: D of `qformer`.
        embedding_size: D_emb, width of the token embeddings.
        max_tokens: longest text.
        decodes: build the token that begins a text `behind` queries.
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
        """Input of the first layer: frozen embeddings [T, D_emb] of packed texts, int32 [B+1] -> [T, D].

        `shifted` puts the decode token before every text and drops the last token: row t is known before token t.
        """
        projected = self.token_projection(token_embeds)
        position = segment_positions(cu_seqlens, token_embeds.shape[0])
        if shifted:
            assert self.decode_token is not None
            projected = torch.where(position[:, None] == 0, self.decode_token.to(projected.dtype), projected.roll(1, 0))
        return self.norm(projected + self.positions.index_select(0, position))

    def alone(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Texts without queries, both directions: [T, D] -> [T, D]."""
        plan = AttentionPlan(cu_seqlens, causal=False)
        return self._texts(hidden, cu_seqlens, plan)

    def behind(self, hidden: Tensor, cu_seqlens: Tensor, layer_inputs: Sequence[Tensor], group: Tensor) -> Tensor:
        """Texts that continue queries, causally: [T, D], int32 [B+1] -> [T, D].

        Args:
            layer_inputs: [G, Q, D] each, from the queries' own pass (`QFormer.forward`), which no text changes.
            group: int32 [B], the group of queries that each text continues.
        """
        plan = AttentionPlan(cu_seqlens, lengthened_cu_seqlens(cu_seqlens, layer_inputs[0].shape[1]), causal=True)
        return self._texts(hidden, cu_seqlens, plan, layer_inputs, group)

    def _texts(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        plan: AttentionPlan,
        layer_inputs: Sequence[Tensor] | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        def run(layer: QFormerLayer, feed_forward: nn.Module, hidden: Tensor, before: Tensor | None) -> Tensor:
            return feed_forward(layer.self_attention.forward_packed(hidden, cu_seqlens, plan, before, group))

        qformer = self._qformer[0]
        inputs_before: Sequence[Tensor | None] = layer_inputs or [None] * len(self.feed_forwards)
        for layer, feed_forward, before in zip(qformer.blocks, self.feed_forwards, inputs_before, strict=True):
            hidden = qformer.run(run, layer, feed_forward, hidden, before)
        return hidden

    def beside(
        self, hidden: Tensor, cu_seqlens: Tensor, queries: Tensor, states: Tensor, boundaries: CrossBoundaries
    ) -> Tensor:
        """Queries that read a text and a user at once; returns the queries, [G, Q, D].

        Args:
            hidden: [T, D], a text for every group.
            cu_seqlens: int32 [G+1].
            queries: [G, Q, D], the input of the first layer; groups of a user one after the other.
            states: [N, D], packed.
            boundaries: of the queries in the states.
        """
        qformer, joint = self._qformer[0], _JointRows(cu_seqlens, queries.shape[1])
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
        for layer, feed_forward in zip(qformer.blocks, self.feed_forwards, strict=True):
            rows, hidden = qformer.run(run, layer, feed_forward, rows, hidden, states)
        return rows.view(queries.shape)


class _JointRows:
    """The rows of every group's queries, each group before its text."""

    def __init__(self, cu_seqlens: Tensor, num_queries: int) -> None:
        device, total = cu_seqlens.device, sum(lengths_on_host(cu_seqlens))
        self.cu_seqlens = lengthened_cu_seqlens(cu_seqlens, num_queries)
        self.queries = (self.cu_seqlens[:-1, None] + torch.arange(num_queries, device=device)).flatten()
        self.text = torch.arange(total, device=device) + (segment_ids(cu_seqlens, total) + 1) * num_queries
        self._order = torch.argsort(torch.cat([self.queries, self.text]))

    def join(self, queries: Tensor, text: Tensor) -> Tensor:
        """[G*Q, D] and [T, D] -> [G*Q + T, D]."""
        return torch.cat([queries, text]).index_select(0, self._order)

    def part(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `join`."""
        return joint.index_select(0, self.queries), joint.index_select(0, self.text)


def select_sequences(cu_seqlens: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Rows int64 [T'] of the packed sequences `which`, int64 [G] with repeats, and their int32 [G+1].

    The host waits for the device if it does not know `which`: the number of rows depends on it.
    """
    host, device = on_host(which), cu_seqlens.device
    chosen = to_device(cu_seqlens_from_lengths(on_host(cu_seqlens).diff().index_select(0, host)), device)
    total = sum(lengths_on_host(chosen))
    starts = cu_seqlens[:-1].long().index_select(0, which)
    rows = starts.repeat_interleave(chosen.diff().long(), output_size=total) + segment_positions(chosen, total)
    return rows, chosen
