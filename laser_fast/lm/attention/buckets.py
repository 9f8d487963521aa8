"""The portable backend of packed attention: sequences of similar length as padded blocks, on any device.

A block goes through `torch.nn.functional.scaled_dot_product_attention`, or through plain arithmetic where scores are
soft-capped or have sinks.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.lm.attention.flash import AttentionKind

_LENGTH_STEP = 16  # lengths are rounded up to it: few buckets, and at most 15 slots of padding per sequence


@dataclass(frozen=True)
class Bucket:
    """Sequences as one padded block of `sequences * query_length` slots of queries, and of keys likewise."""

    sequences: int
    query_length: int
    key_length: int
    mask: Tensor | None  # bool [sequences, 1, query_length, key_length], True = attend; None = attend everywhere
    keyless: Tensor | None  # bool [sequences, 1, query_length, 1], True where a query sees no key and its output is 0
    _additive: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False)

    def additive_mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores, made once for all layers: with a bool mask every layer would keep its own."""
        if self.mask is None:
            return None
        if dtype not in self._additive:
            zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._additive[dtype] = zeros.masked_fill_(~self.mask, -torch.inf)
        return self._additive[dtype]


@dataclass(frozen=True)
class BucketLayout:
    """Where each packed token goes in the padded blocks, which lie one behind the other."""

    query_slots: Tensor  # int64 [Tq]
    key_slots: Tensor  # int64 [Tk]
    buckets: tuple[Bucket, ...]
    num_spare_keys: int = 0  # slots behind the blocks, for keys of sequences without queries

    @staticmethod
    def build(
        lengths_q: list[int], lengths_k: list[int], device: torch.device, causal: bool, sliding_window: int | None
    ) -> "BucketLayout":
        """Lay out sequences of these lengths on the host, and copy to the device without waiting."""
        groups: dict[tuple[int, int], list[int]] = {}
        for sequence, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            if length_q:
                groups.setdefault((_round_up(length_q), _round_up(length_k)), []).append(sequence)
        first_query_slot, first_key_slot = [0] * len(lengths_q), [0] * len(lengths_k)
        buckets, query_start, key_start = [], 0, 0
        for members in groups.values():
            counts_q = torch.tensor([lengths_q[i] for i in members])
            counts_k = torch.tensor([lengths_k[i] for i in members])
            query_length, key_length = max(lengths_q[i] for i in members), max(1, *(lengths_k[i] for i in members))
            for sequence in members:
                first_query_slot[sequence], first_key_slot[sequence] = query_start, key_start
                query_start, key_start = query_start + query_length, key_start + key_length
            masks = _bucket_mask(counts_q, counts_k, query_length, key_length, causal, sliding_window)
            mask, keyless = (None if one is None else one.to(device, non_blocking=True) for one in masks)
            buckets.append(Bucket(len(members), query_length, key_length, mask, keyless))
        num_spare_keys = 0
        for sequence, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            if not length_q:
                first_key_slot[sequence] = key_start + num_spare_keys
                num_spare_keys += length_k
        query_slots, key_slots = _slots(first_query_slot, lengths_q, device), _slots(first_key_slot, lengths_k, device)
        return BucketLayout(query_slots, key_slots, tuple(buckets), num_spare_keys)


def attend_in_buckets(
    query: Tensor, key: Tensor, value: Tensor, layout: BucketLayout, kind: AttentionKind, sinks: Tensor | None
) -> Tensor:
    """Arguments as in `varlen_attention`: [Tq, H, d], [Tk, H_kv, d] twice -> [Tq, H, d]."""
    if not layout.buckets:
        return query * 0.0
    query_sizes = [bucket.sequences * bucket.query_length for bucket in layout.buckets]
    key_sizes = [*(bucket.sequences * bucket.key_length for bucket in layout.buckets), layout.num_spare_keys]
    queries = _LayOut.apply(query, layout.query_slots, sum(query_sizes)).split(query_sizes)
    keys, values = (_LayOut.apply(one, layout.key_slots, sum(key_sizes)).split(key_sizes)[:-1] for one in (key, value))
    outputs = []
    for bucket, *slots in zip(layout.buckets, queries, keys, values, strict=True):
        block_q, block_k, block_v = (one.unflatten(0, (bucket.sequences, -1)).transpose(1, 2) for one in slots)
        if kind.softcap is None and sinks is None:
            attended = F.scaled_dot_product_attention(
                block_q,
                block_k,
                block_v,
                attn_mask=bucket.additive_mask(query.dtype),
                dropout_p=kind.dropout,
                scale=kind.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        else:
            attended = _plain_attention(block_q, block_k, block_v, bucket.mask, kind, sinks)
        if bucket.keyless is not None:
            attended = attended.masked_fill(bucket.keyless, 0.0)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.query_slots)


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: AttentionKind, sinks: Tensor | None
) -> Tensor:
    """[n, H, Lq, d], [n, H_kv, Lk, d] twice -> [n, H, Lq, d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) * kind.scale).to(torch.promote_types(query.dtype, torch.float32))
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        # a sink takes part in the softmax and has no value
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    probabilities = F.dropout(scores.softmax(dim=-1), kind.dropout)
    return probabilities[..., : key.shape[2]].to(value.dtype) @ value


def _round_up(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _slots(first_slot: list[int], lengths: list[int], device: torch.device) -> Tensor:
    """The slot of every packed token: int64 [T]."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    starts = counts.cumsum(0) - counts
    shift = torch.tensor(first_slot, dtype=torch.int64) - starts
    total = sum(lengths)
    return (torch.arange(total) + shift.repeat_interleave(counts, output_size=total)).to(device, non_blocking=True)


class _LayOut(torch.autograd.Function):
    """Rows to their slots, zeros elsewhere; unlike `index_copy` it keeps no rows for backward."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots)
        return tokens.new_zeros(num_slots, *tokens.shape[1:]).index_copy_(0, slots, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


def visible_keys(
    counts_q: Tensor, counts_k: Tensor, query_length: int, key_length: int, causal: bool, sliding_window: int | None
) -> Tensor:
    """Which keys each slot of a padded block sees: int64 [n] queries and keys -> bool [n, query_length, key_length]."""
    counts_q, counts_k = counts_q[:, None, None], counts_k[:, None, None]
    key_index = torch.arange(key_length, device=counts_k.device)
    # where every query stands on the axis of the keys
    position = torch.arange(query_length, device=counts_k.device)[:, None] + (counts_k - counts_q)
    mask = (key_index < counts_k).expand(-1, query_length, -1)
    if causal:
        mask = mask & (key_index <= position)
    if sliding_window is not None:
        mask = mask & (key_index > position - sliding_window)
        if not causal:
            mask = mask & (key_index < position + sliding_window)
    return mask


def _bucket_mask(
    counts_q: Tensor, counts_k: Tensor, query_length: int, key_length: int, causal: bool, sliding_window: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and keyless rows of one bucket, on the host; None where they would change nothing."""
    if not causal and sliding_window is None and bool((counts_k == key_length).all()):
        return None, None  # padded queries may attend anywhere: their outputs are dropped
    mask = visible_keys(counts_q, counts_k, query_length, key_length, causal, sliding_window)
    # a softmax over nothing is NaN, so a query that sees no key, padded or real, attends everywhere
    sees_none = ~mask.any(dim=-1, keepdim=True)
    real = (torch.arange(query_length)[:, None] < counts_q[:, None, None]) & sees_none
    mask = (mask | sees_none)[:, None]
    return mask, real[:, None] if bool(real.any()) else None
