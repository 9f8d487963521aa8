"""One packed batch as the attention of every layer sees it: bounds of its sequences, prefixes, plans."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from laser_fast.lm.attention.packed_attention import AttentionPlan, varlen_attention
from laser_fast.lm.key_value_prefix import KeyValuePrefix
from laser_fast.lm.uncompiled import uncompiled
from laser_fast.ops.segments import even_cu_seqlens, lengthened_cu_seqlens, segment_positions


class PackedLayout:
    """Where the sequences of one packed batch start, what is injected in front of them, and the attention plans.

    Attributes:
        cu_seqlens: int32 [B+1] over the queries; cu_seqlens_k over the keys, the prefix counted.
        layer_of: index of every attention module in the order of its first call, kept from batch to batch.
        keep: whether `read` gets the keys and values [T, H_kv, d] of every layer as the model made them.
        rows: int64 [B], the last position of every sequence where only its state is wanted; else None.
        first_position: from where the model counts positions; None = from where it was found to.
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
        first_position: int | None = None,
        new_plan: Callable[..., AttentionPlan] = AttentionPlan,
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self.cu_seqlens_k = cu_seqlens if prefix is None else lengthened_cu_seqlens(cu_seqlens, prefix.length)
        self.layer_of = layer_of
        self.prefix = prefix
        self.keep = keep
        self.read: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows = cu_seqlens[1:].long() - 1 if last_only else None
        self.first_position = first_position
        self.keys_only = False
        self.num_attention_calls = 0
        self._new_plan = new_plan
        self._collected: tuple[Tensor, Tensor] | None = None
        self._plans: dict[tuple[bool, int | None, bool], AttentionPlan] = {}

    def positions(self, num_tokens: int) -> Tensor:
        """Position of every token in its sequence, the prefix counted: int64 [T]."""
        return segment_positions(self.cu_seqlens, num_tokens) + (0 if self.prefix is None else self.prefix.length)

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

        Without its module the layer is taken to be the next: all of them attend in turn.
        """
        self.num_attention_calls += 1
        if self._collected is None:
            layer = self.num_attention_calls - 1
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

    def collect_keys(self, run: Callable[[], object]) -> None:
        """Run a layer until its attention has the keys and values of all positions, which `rows_only` uses."""
        self.keys_only = True
        try:
            run()
        except _KeysKnown:
            return
        finally:
            self.keys_only = False
        raise RuntimeError("Execution: the last layer must call the packed attention, got no call")

    @contextmanager
    def rows_only(self) -> Iterator[None]:
        """While this is open, queries are those of `rows` and the keys and values are the collected ones."""
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
    """Raised by the attention of a layer that is run for its keys and values alone."""
