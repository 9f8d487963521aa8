"""One packed batch as the attention of every layer sees it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from laser_fast.lm.attention.packed_attention import AttentionPlan, varlen_attention
from laser_fast.lm.key_value_prefix import KeyValuePrefix, length_of
from laser_fast.lm.uncompiled import uncompiled
from laser_fast.ops.segments import even_cu_seqlens, lengthened_cu_seqlens, segment_positions


class PackedLayout:
    """Where the sequences of one packed batch start, what is injected in front of them, and the attention plans.

    Attributes:
        cu_seqlens: int32 [B+1] over the queries; cu_seqlens_k over the keys, the prefix counted.
        layer_of: index of every attention module in the order of its first call, kept from batch to batch.
        read: with `keep`, keys and values [T, H_kv, d] of every layer as the model made them.
        rows: with `last_only` int64 [B], the last position of every sequence, whose states alone are wanted.
        keys_only: whether the attention ends once it has its keys and values, so that no query is read.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        layer_of: dict[nn.Module, int],
        prefix: KeyValuePrefix | None,
        *,
        keep: bool = False,
        last_only: bool = False,
        new_plan: Callable[..., AttentionPlan] = AttentionPlan,
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self.cu_seqlens_k = cu_seqlens if prefix is None else lengthened_cu_seqlens(cu_seqlens, prefix.length)
        self.layer_of = layer_of
        self.prefix = prefix
        self.keep = keep
        self.read: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows = cu_seqlens[1:].long() - 1 if last_only else None
        self.keys_only = False
        self.num_attention_calls = 0
        self._new_plan = new_plan
        self._collected: tuple[Tensor, Tensor] | None = None
        self._plans: dict[tuple[bool, int | None, bool], AttentionPlan] = {}

    def positions(self, num_tokens: int) -> Tensor:
        """Position of every token in its sequence, the prefix counted: int64 [T]."""
        return segment_positions(self.cu_seqlens, num_tokens) + length_of(self.prefix)

    def wanted(self, states: Tensor) -> Tensor:
        """The states of `rows`, or all of them: [T, D] -> [B, D] or [T, D]."""
        return states if self.rows is None else states.index_select(0, self.rows)

    @uncompiled
    def attend(
        self,
        module: nn.Module | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool,
        sliding_window: int | None,
        **options: Any,
    ) -> Tensor:
        """The attention of one layer, options as in `varlen_attention`: [T, H, d], [T, H_kv, d] twice -> [T, H, d].

        Without its `module` the layer is the next one: all of them attend in turn.
        """
        layer = self.num_attention_calls
        self.num_attention_calls += 1
        if self._collected is None:
            if module is not None:
                layer = self.layer_of.setdefault(module, len(self.layer_of))
            if self.keep:
                self.read[layer] = (key, value)
            if self.prefix is not None:
                key, value = self.prefix.inject(layer, key, value, self.cu_seqlens)
            if self.keys_only:
                self._collected = (key, value)
                raise _KeysKnown
        else:
            key, value = self._collected
        plan = self._plan(causal, sliding_window)
        return varlen_attention(
            query, key, value, self.cu_seqlens, self.cu_seqlens_k, causal=causal, plan=plan, **options
        )

    @contextmanager
    def rows_only(self, run: Callable[[], object]) -> Iterator[None]:
        """While this is open, the queries are those of `rows`, the keys and values those of a `run` of the layer."""
        self.keys_only = True
        try:
            run()
            raise RuntimeError("Execution: the last layer must call the packed attention, got no call")
        except _KeysKnown:
            pass
        finally:
            self.keys_only = False
        try:
            yield
        finally:
            self._collected = None

    def _plan(self, causal: bool, sliding_window: int | None) -> AttentionPlan:
        """The plan for this kind of mask, made at its first use and shared by all layers."""
        rows_only = self._collected is not None
        kind = (causal, sliding_window, rows_only)
        if kind not in self._plans:
            queries = self.cu_seqlens
            if rows_only:  # one query a sequence
                queries = even_cu_seqlens(queries.shape[0] - 1, 1, queries.device)
            self._plans[kind] = self._new_plan(queries, self.cu_seqlens_k, causal=causal, sliding_window=sliding_window)
        return self._plans[kind]


class _KeysKnown(Exception):
    """Ends a layer that is run for its keys and values alone."""
