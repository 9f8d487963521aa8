"""Attention over packed sequences: `softmax(scale * Q K^T) V` within each sequence of a batch without padding.

All tokens of a batch lie in one tensor, and `cu_seqlens` says where each sequence starts. On a GPU in half precision
FlashAttention's kernels run (`flash`), elsewhere padded blocks of similar length (`buckets`); on the meta device only
memory is modelled (`meta`). What depends on the lengths alone is planned once a batch (`AttentionPlan`).
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from laser_fast.lm.attention.buckets import BucketLayout, attend_in_buckets
from laser_fast.lm.attention.flash import AttentionKind, PackedLengths, choose_backend
from laser_fast.lm.attention.meta import attend_without_values
from laser_fast.lm.uncompiled import uncompiled
from laser_fast.ops.segments import lengths_on_host

_recorders: list[Counter[str]] = []


@contextmanager
def record_backends() -> Iterator[Counter[str]]:
    """Count the attentions of all threads while this is open, by backend and dtype: "torch flash, bfloat16", ..."""
    counts: Counter[str] = Counter()
    _recorders.append(counts)
    try:
        yield counts
    finally:
        _recorders[:] = [other for other in _recorders if other is not counts]  # `remove` would take an equal one


class AttentionPlan:
    """What the backends make of the lengths of one batch under one kind of mask."""

    @uncompiled
    def __init__(
        self,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        causal: bool,
        sliding_window: int | None = None,
    ) -> None:
        """Read the lengths; waits for the device where the host does not know them (`ops.host_copies`).

        Args:
            cu_seqlens_q: int32 [B+1], where the queries of each sequence start.
            cu_seqlens_k: the same for the keys; None = as the queries.
            causal: a query sees the keys up to its own position, aligned at the last query and the last key.
            sliding_window: a query sees only so many keys, up to its own position or on either side of it.
        """
        self.causal = causal
        self.sliding_window = sliding_window
        self._cu_seqlens_q = cu_seqlens_q
        self._cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        self.lengths_q = lengths_on_host(cu_seqlens_q)
        self.lengths_k = self.lengths_q if cu_seqlens_k is None else lengths_on_host(cu_seqlens_k)
        if len(self.lengths_q) != len(self.lengths_k):
            raise ValueError(
                "AttentionPlan: cu_seqlens_q and cu_seqlens_k must describe the same number of sequences, "
                f"got {len(self.lengths_q)} and {len(self.lengths_k)}"
            )
        self.num_queries, self.num_keys = sum(self.lengths_q), sum(self.lengths_k)

    @cached_property
    def packed(self) -> PackedLengths:
        """For the kernels that take packed sequences."""
        longest = max(self.lengths_q, default=0), max(self.lengths_k, default=0)
        return PackedLengths(self._cu_seqlens_q, self._cu_seqlens_k, *longest)

    @cached_property
    def buckets(self) -> BucketLayout:
        """For the portable backend."""
        device = self._cu_seqlens_q.device
        return BucketLayout.build(self.lengths_q, self.lengths_k, device, self.causal, self.sliding_window)

    @cached_property
    def keyless(self) -> Tensor | None:
        """bool [Tq, 1, 1], queries of sequences without any key; None where every query has one."""
        if all(keys or not queries for queries, keys in zip(self.lengths_q, self.lengths_k, strict=True)):
            return None
        empty, lengths = self._cu_seqlens_k.diff() == 0, self._cu_seqlens_q.diff()
        return empty.repeat_interleave(lengths, output_size=self.num_queries)[:, None, None]


@uncompiled
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Scaled dot-product attention within each packed sequence.

    Args:
        query: [Tq, H, d], floating point.
        key, value: [Tk, H_kv, d], H a multiple of H_kv (grouped-query attention).
        cu_seqlens_q, cu_seqlens_k, causal, sliding_window: see `AttentionPlan`; sequences may be empty.
        scale: of the scores; None = 1/sqrt(d).
        dropout: of the attention probabilities; 0 outside training.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sinks: [H], a score per head that takes part in every softmax and has no value (gpt-oss).
        plan: for these lengths, `causal` and `sliding_window`; None = planned here.

    Returns:
        [Tq, H, d]; 0 for a query that sees no key.
    """
    _check(query, key, value)
    if plan is None:
        plan = AttentionPlan(cu_seqlens_q, cu_seqlens_k, causal=causal, sliding_window=sliding_window)
    if query.is_meta:
        return attend_without_values(query, key, value)
    if plan.num_queries != query.shape[0] or plan.num_keys != key.shape[0]:
        raise ValueError(
            "varlen_attention: cu_seqlens must end at the number of query and key tokens, got "
            f"{plan.num_queries} and {plan.num_keys} for {query.shape[0]} and {key.shape[0]}"
        )
    if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
        raise ValueError(f"varlen_attention: sinks must be [{query.shape[1]}], got {tuple(sinks.shape)}")
    kind = AttentionKind(plan.causal, scale or 1 / math.sqrt(query.shape[2]), plan.sliding_window, dropout, softcap)
    name, backend = choose_backend(query, key, kind, has_sinks=sinks is not None)
    for counts in _recorders:
        counts[f"{name}, {str(query.dtype).removeprefix('torch.')}"] += 1
    if backend is None or not plan.num_queries or not plan.num_keys:
        return attend_in_buckets(query, key, value, plan.buckets, kind, sinks)
    output = backend(query, key, value, plan.packed, kind)
    return output if plan.keyless is None else output.masked_fill(plan.keyless, 0.0)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 3 or key.dim() != 3:
        raise ValueError(
            "varlen_attention: query and key must be [tokens, heads, head size], "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key.shape != value.shape:
        raise ValueError(
            f"varlen_attention: key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    kind = query.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not query.dtype == key.dtype == value.dtype and not casts:
        raise TypeError(
            "varlen_attention: query, key and value must have one dtype, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}; move the module as a whole or not at all"
        )
    if query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "varlen_attention: query must have the head size of key and a multiple of its heads, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
