"""Attention over packed sequences: `softmax(scale * Q K^T) V` within each sequence of a batch without padding.

The layout is that of FlashAttention's variable-length kernels: all tokens of a batch in one tensor, `cu_seqlens`
marking where each sequence starts. Here the portable backend: sequences are laid out in buckets of similar length and
each bucket goes through `torch.nn.functional.scaled_dot_product_attention`. The layout depends on the lengths alone,
so it is planned once a batch (`AttentionPlan`) and shared by all layers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LENGTH_STEP = 16  # lengths are rounded up to this: few buckets, and at most 15 slots of padding per sequence


@dataclass(frozen=True)
class _Bucket:
    """Sequences laid out as one padded block: slots `[query_start, query_start + sequences * query_length)`."""

    sequences: int
    query_start: int
    query_length: int
    key_start: int
    key_length: int
    mask: Tensor | None  # bool [sequences, 1, query_length, key_length], True = attend; None = attend everywhere
    keyless: Tensor | None  # bool [sequences, 1, query_length, 1], True where a real query sees no key: its output is 0


@dataclass(frozen=True)
class AttentionPlan:
    """Where each packed token goes in the padded blocks, for one batch of lengths and one kind of mask."""

    query_slots: Tensor  # int64 [Tq]
    key_slots: Tensor  # int64 [Tk]
    num_query_slots: int
    num_key_slots: int
    buckets: tuple[_Bucket, ...]

    @staticmethod
    def build(
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *, causal: bool, sliding_window: int | None = None
    ) -> "AttentionPlan":
        """Plan the layout; reads the lengths on the host (one synchronisation on a GPU).

        Args:
            cu_seqlens_q: int32 [B+1], where the queries of each sequence start.
            cu_seqlens_k: the same for the keys; None = as the queries.
            causal: a query sees the keys up to its own position, aligned at the last query and the last key.
            sliding_window: a query sees only so many of the last keys up to its own position (two-sided when not
                causal).
        """
        device = cu_seqlens_q.device
        lengths_q = cu_seqlens_q.diff().tolist()
        lengths_k = lengths_q if cu_seqlens_k is None else cu_seqlens_k.diff().tolist()
        if len(lengths_q) != len(lengths_k):
            raise ValueError(
                "AttentionPlan: cu_seqlens_q and cu_seqlens_k must describe the same number of sequences, "
                f"got {len(lengths_q)} and {len(lengths_k)}"
            )
        groups: dict[tuple[int, int], list[int]] = {}
        for sequence, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            if length_q:
                groups.setdefault((_round_up(length_q), _round_up(length_k)), []).append(sequence)
        first_query_slot = [0] * len(lengths_q)
        first_key_slot = [0] * len(lengths_k)
        buckets, query_start, key_start = [], 0, 0
        for members in groups.values():
            counts_q = torch.tensor([lengths_q[i] for i in members], device=device)
            counts_k = torch.tensor([lengths_k[i] for i in members], device=device)
            query_length, key_length = int(counts_q.max()), max(int(counts_k.max()), 1)
            for row, sequence in enumerate(members):
                first_query_slot[sequence] = query_start + row * query_length
                first_key_slot[sequence] = key_start + row * key_length
            mask, keyless = _bucket_mask(counts_q, counts_k, query_length, key_length, causal, sliding_window)
            buckets.append(_Bucket(len(members), query_start, query_length, key_start, key_length, mask, keyless))
            query_start += len(members) * query_length
            key_start += len(members) * key_length
        # keys of a sequence without queries have no block; they go to one spare slot that nobody reads
        for sequence, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            if not length_q and length_k:
                first_key_slot[sequence] = key_start
                key_start += length_k
        return AttentionPlan(
            _slots(first_query_slot, lengths_q, device),
            _slots(first_key_slot, lengths_k, device),
            query_start,
            key_start,
            tuple(buckets),
        )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool,
    scale: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Scaled dot-product attention within each packed sequence.

    Args:
        query: [Tq, H, d], floating point.
        key, value: [Tk, H_kv, d], H a multiple of H_kv (grouped-query attention).
        cu_seqlens_q, cu_seqlens_k: int32 [B+1]; keys as the queries when `cu_seqlens_k` is None. Empty sequences are
            allowed.
        causal: aligned bottom-right: the last query of a sequence sees its last key.
        scale: of the scores; None = 1/sqrt(d).
        sliding_window: see `AttentionPlan.build`.
        dropout: on the attention probabilities; 0 outside training.
        plan: from `AttentionPlan.build` for these very lengths and mask; None = planned here.

    Returns:
        [Tq, H, d]; 0 for a query that sees no key.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check_shapes(query, key, value)
    if plan is None:
        plan = AttentionPlan.build(cu_seqlens_q, cu_seqlens_k, causal=causal, sliding_window=sliding_window)
    if plan.query_slots.shape[0] != query.shape[0] or plan.key_slots.shape[0] != key.shape[0]:
        raise ValueError(
            "varlen_attention: cu_seqlens must end at the number of query and key tokens, got "
            f"{plan.query_slots.shape[0]} and {plan.key_slots.shape[0]} for {query.shape[0]} and {key.shape[0]}"
        )
    if not plan.buckets:
        return query * 0.0
    queries = _lay_out(query, plan.query_slots, plan.num_query_slots)
    keys = _lay_out(key, plan.key_slots, plan.num_key_slots)
    values = _lay_out(value, plan.key_slots, plan.num_key_slots)
    outputs = []
    for bucket in plan.buckets:
        size_q, size_k = bucket.sequences * bucket.query_length, bucket.sequences * bucket.key_length
        attended = F.scaled_dot_product_attention(
            queries[bucket.query_start : bucket.query_start + size_q]
            .unflatten(0, (bucket.sequences, -1))
            .transpose(1, 2),
            keys[bucket.key_start : bucket.key_start + size_k].unflatten(0, (bucket.sequences, -1)).transpose(1, 2),
            values[bucket.key_start : bucket.key_start + size_k].unflatten(0, (bucket.sequences, -1)).transpose(1, 2),
            attn_mask=bucket.mask,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        if bucket.keyless is not None:
            attended = attended.masked_fill(bucket.keyless, 0.0)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, plan.query_slots)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 3 or key.dim() != 3:
        raise ValueError(
            "varlen_attention: query and key must be [tokens, heads, head size], "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key.shape != value.shape:
        raise ValueError(
            f"varlen_attention: key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "varlen_attention: query must have the head size of key and a multiple of its heads, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )


def _round_up(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _slots(first_slot: list[int], lengths: list[int], device: torch.device) -> Tensor:
    """First slot of the sequence plus position in it, for every packed token: int64 [T]."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    starts = counts.cumsum(0) - counts
    shift = torch.tensor(first_slot, dtype=torch.int64) - starts
    total = sum(lengths)
    return (torch.arange(total) + shift.repeat_interleave(counts, output_size=total)).to(device)


def _lay_out(tokens: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    # index_copy rather than a gather with repeats: its backward is a plain gather, without accumulation
    return tokens.new_zeros(num_slots, *tokens.shape[1:]).index_copy(0, slots, tokens)


def _bucket_mask(
    counts_q: Tensor, counts_k: Tensor, query_length: int, key_length: int, causal: bool, sliding_window: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and keyless rows of one bucket; None where they would change nothing."""
    device = counts_q.device
    if not causal and sliding_window is None and bool((counts_k == key_length).all()):
        return None, None  # padded queries may attend anywhere: their outputs are dropped
    query_index = torch.arange(query_length, device=device)[:, None]
    key_index = torch.arange(key_length, device=device)
    mask = (key_index < counts_k[:, None])[:, None, :].expand(-1, query_length, -1)
    position = query_index + (counts_k - counts_q)[:, None, None]  # of the query on the axis of the keys
    if causal:
        mask = mask & (key_index <= position)
    if sliding_window is not None:
        mask = mask & (key_index > position - sliding_window)
        if not causal:
            mask = mask & (key_index < position + sliding_window)
    sees_none = ~mask.any(
        dim=-1, keepdim=True
    )  # also padded queries; a softmax over nothing is NaN, so let them attend
    real = (query_index < counts_q[:, None, None]) & sees_none
    mask = (mask | sees_none)[:, None]
    return mask, real[:, None] if bool(real.any()) else None
