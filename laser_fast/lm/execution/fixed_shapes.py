"""The frozen model in a bounded number of shapes, each recorded once and replayed: CUDA graphs for serving.

A batch is filled up with sequences of zeros to one of few numbers of tokens and of sequences. Where its sequences start
is read on the device, so one recording serves all batches that fill up to its shape.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from laser_fast.lm.attention.buckets import Bucket, BucketLayout, visible_keys
from laser_fast.lm.attention.flash import PackedLengths
from laser_fast.lm.attention.packed_attention import AttentionPlan
from laser_fast.lm.execution.cuda_graphs import CudaGraphs, Recorder
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.key_value_prefix import KeyValuePrefix, length_of
from laser_fast.lm.packed_layout import PackedLayout
from laser_fast.lm.weights_version import WeightsVersion
from laser_fast.ops.checks import validate_indices
from laser_fast.ops.precision import autocast_dtype
from laser_fast.ops.segments import lengths_on_host, segment_ids, segment_positions, validate_cu_seqlens

_LEAST_TOKENS = 64
_STEPS_PER_DOUBLING = 4  # 64, 80, 96, 112, 128, 160, ... tokens: 8 % more than needed on average, at most 25 %


@dataclass(frozen=True)
class FixedShape:
    """Packed tokens T, sequences B, and a bound of the longest sequence without its prefix."""

    tokens: int
    sequences: int
    longest: int


def fixed_shape(num_tokens: int, num_sequences: int, longest: int, limit: int | None = None) -> FixedShape:
    """The shape that a batch is filled up to by at least one sequence, none of them empty or longer than `limit`."""
    bound = max(_LEAST_TOKENS, 1 << (longest - 1).bit_length())
    if limit is not None:
        bound = min(bound, limit)
    behind = 1 << (num_sequences - 1).bit_length()
    while True:
        added = 1 + behind - num_sequences
        tokens = _next_step(num_tokens + added)
        if tokens - num_tokens <= added * bound:
            return FixedShape(tokens, 1 + behind, bound)
        behind *= 2


def _next_step(num_tokens: int) -> int:
    if num_tokens <= _LEAST_TOKENS:
        return _LEAST_TOKENS
    step = (1 << ((num_tokens - 1).bit_length() - 1)) // _STEPS_PER_DOUBLING
    return -(-num_tokens // step) * step


def filled_offsets(cu_seqlens: Tensor, num_tokens: int, shape: FixedShape) -> Tensor:
    """`cu_seqlens` [B+1] and the bounds of the added sequences, even in length: int32 [shape.sequences + 1]."""
    added = shape.sequences + 1 - cu_seqlens.shape[0]
    steps = torch.arange(1, added + 1, device=cu_seqlens.device)
    behind = num_tokens + steps * (shape.tokens - num_tokens) // added
    return torch.cat([cu_seqlens, behind.to(cu_seqlens.dtype)])


class FixedPlan(AttentionPlan):
    """An attention plan from a shape alone: the host reads no length."""

    def __init__(
        self, packed: PackedLengths, num_queries: int, num_keys: int, causal: bool, sliding_window: int | None
    ) -> None:
        self.packed = packed
        self.num_queries, self.num_keys = num_queries, num_keys
        self.causal, self.sliding_window = causal, sliding_window
        self.keyless = None  # every query has its own key

    @cached_property
    def buckets(self) -> BucketLayout:
        """One block of all sequences, as wide as the longest may be."""
        bounds_q, bounds_k, longest_q, longest_k = self.packed
        mask = visible_keys(bounds_q.diff(), bounds_k.diff(), longest_q, longest_k, self.causal, self.sliding_window)
        mask = (mask | ~mask.any(dim=-1, keepdim=True))[:, None]  # slots beyond a sequence attend somewhere
        bucket = Bucket(bounds_q.shape[0] - 1, longest_q, longest_k, mask, None)
        slots = _slots(bounds_q, self.num_queries, longest_q), _slots(bounds_k, self.num_keys, longest_k)
        return BucketLayout(*slots, (bucket,))


def _slots(cu_seqlens: Tensor, num_tokens: int, width: int) -> Tensor:
    """The slot of every packed token where each sequence has `width` of them: int64 [T]."""
    return segment_ids(cu_seqlens, num_tokens) * width + segment_positions(cu_seqlens, num_tokens)


class _Recording:
    """A run of the model on tensors of its own, which `load` fills."""

    def __init__(
        self, lm: FrozenLM, recorder: Recorder, shape: FixedShape, prefix: KeyValuePrefix | None, last_only: bool
    ) -> None:
        self._lm, self._shape, self._last_only = lm, shape, last_only
        self._inputs_embeds = torch.zeros(shape.tokens, lm.hidden_size, dtype=lm.dtype, device=lm.device)
        ends = torch.arange(shape.sequences + 1, device=lm.device) * shape.tokens // shape.sequences
        self._cu_seqlens = ends.int()
        self._prefix = None if prefix is None else _fixed_prefix(prefix, shape.sequences)
        self.replay = recorder.record(self._run)

    def _run(self) -> Tensor:
        last_only, plan = self._last_only, self._new_plan
        layout = PackedLayout(self._cu_seqlens, self._lm.layer_of, self._prefix, last_only=last_only, new_plan=plan)
        return self._lm.run_layers(self._inputs_embeds, layout)

    def _new_plan(self, queries: Tensor, keys: Tensor, *, causal: bool, sliding_window: int | None) -> AttentionPlan:
        """For whole sequences, or for one query of each."""
        shape, added = self._shape, length_of(self._prefix)
        longest, num_queries = (shape.longest, shape.tokens) if queries is self._cu_seqlens else (1, shape.sequences)
        packed = PackedLengths(queries, keys, longest, shape.longest + added)
        return FixedPlan(packed, num_queries, shape.tokens + shape.sequences * added, causal, sliding_window)

    def load(self, inputs_embeds: Tensor, cu_seqlens: Tensor, prefix: KeyValuePrefix | None) -> None:
        num_tokens = inputs_embeds.shape[0]
        self._inputs_embeds[:num_tokens].copy_(inputs_embeds)
        self._inputs_embeds[num_tokens:].zero_()
        self._cu_seqlens.copy_(filled_offsets(cu_seqlens, num_tokens, self._shape))
        if prefix is None or self._prefix is None:
            return
        size, slots = prefix.batch_size, self._prefix.slots
        if prefix.slots is not None and slots is not None:
            validate_indices("FrozenLM", "prefix.slots", prefix.slots, prefix.keys[0].shape[0])
            slots[:size].copy_(prefix.slots)
            slots[size:].zero_()
            return
        mine, given = (*self._prefix.keys, *self._prefix.values), (*prefix.keys, *prefix.values)
        torch._foreach_copy_([tensor[:size] for tensor in mine], list(given))


def _fixed_prefix(prefix: KeyValuePrefix, num_sequences: int) -> KeyValuePrefix:
    """Room for prefixes of this form, or for the slots alone of a pool, which stays where it is."""
    size = 1 if prefix.batch_size == 1 else num_sequences
    if prefix.slots is not None:
        return KeyValuePrefix(prefix.keys, prefix.values, prefix.slots.new_zeros(size))
    keys, values = (tuple(one.new_zeros(size, *one.shape[1:]) for one in each) for each in (prefix.keys, prefix.values))
    return KeyValuePrefix(keys, values)


def _form_of(prefix: KeyValuePrefix | None) -> tuple[object, ...]:
    """What a recording depends on of a prefix."""
    if prefix is None:
        return ()
    pool = None if prefix.slots is None else tuple(key.data_ptr() for key in prefix.keys)
    return prefix.length, prefix.batch_size == 1, prefix.keys[0].dtype, pool


class FixedShapes:
    """Recordings of a frozen model, one for each shape and form of call; the one unused for longest is dropped.

    Any change of a weight drops all of them. Threads may call it on streams of their own; their calls run one after
    another, on the device as well.

    Args:
        lm: what is recorded.
        recorder: None = one that makes CUDA graphs.
        capacity: recordings kept.
        max_tokens: of a batch; the launches of larger ones hide behind their arithmetic.

    Attributes:
        num_captures: recordings made since the start.
    """

    def __init__(
        self, lm: FrozenLM, recorder: Recorder | None = None, *, capacity: int = 64, max_tokens: int = 2048
    ) -> None:
        if min(capacity, max_tokens) < 1:
            raise ValueError(
                f"FixedShapes: capacity and max_tokens must be at least 1, got {capacity} and {max_tokens}"
            )
        self.capacity = capacity
        self.max_tokens = max_tokens
        self.num_captures = 0
        self._lm = lm
        self._recorder = recorder or CudaGraphs(lm.device)
        self._recordings: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()  # oldest use first
        self._forms: dict[tuple[object, ...], tuple[KeyValuePrefix | None, bool]] = {}
        self._weights = WeightsVersion(lm.model, buffers=True)
        self._version = self._weights.now()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._recordings)

    def __call__(
        self, inputs_embeds: Tensor, cu_seqlens: Tensor, prefix: KeyValuePrefix | None, *, last_only: bool
    ) -> Tensor | None:
        """`FrozenLM.forward` without gradient; None for a batch that is too large or empty."""
        num_tokens, num_sequences = inputs_embeds.shape[0], cu_seqlens.shape[0] - 1
        if not 0 < num_tokens <= self.max_tokens or inputs_embeds.is_meta:
            return None
        validate_cu_seqlens("FrozenLM", cu_seqlens, num_tokens)
        longest = max(lengths_on_host(cu_seqlens))
        self._lm.check_length(longest + length_of(prefix))
        shape = self._shape(num_tokens, num_sequences, longest, prefix)
        if shape.tokens > self.max_tokens:
            return None
        with self._turn():
            recording = self._recording(shape, prefix, last_only)
            recording.load(inputs_embeds, cu_seqlens, prefix)
            return recording.replay()[: num_sequences if last_only else num_tokens].clone()

    def prepare(self, batches: Sequence[tuple[int, int]], call: Callable[[], object]) -> None:
        """Record the shapes of some batches, except for those too large, in every form in which `call` calls the model.

        Args:
            batches: (sequences, tokens of each without its prefix).
            call: calls the model at least once.
        """
        with self._lock:
            self._forms.clear()
        call()
        with self._lock:
            forms = dict(self._forms)
        most = self._lm.max_length or math.inf
        wanted = {
            (self._shape(sequences * tokens, sequences, tokens, prefix), form): None
            for form, (prefix, _) in forms.items()
            for sequences, tokens in batches
            if tokens + length_of(prefix) <= most
        }
        fitting = [(shape, form) for shape, form in wanted if shape.tokens <= self.max_tokens]
        if len(fitting) > self.capacity:
            raise ValueError(f"FixedShapes: shapes must be at most capacity = {self.capacity}, got {len(fitting)}")
        with self._turn():
            for shape, form in fitting:
                self._recording(shape, *forms[form])

    def clear(self) -> None:
        """Drop all recordings once the device has done with them."""
        with self._lock:
            self._drop(len(self._recordings))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, on the host and on the device."""
        # tensors made in inference mode could not be filled outside of it
        with self._lock, torch.inference_mode(False), torch.no_grad(), self._recorder.in_turn():
            yield

    def _shape(self, num_tokens: int, num_sequences: int, longest: int, prefix: KeyValuePrefix | None) -> FixedShape:
        limit = None if self._lm.max_length is None else self._lm.max_length - length_of(prefix)
        return fixed_shape(num_tokens, num_sequences, longest, limit)

    def _recording(self, shape: FixedShape, prefix: KeyValuePrefix | None, last_only: bool) -> _Recording:
        if (version := self._weights.now()) != self._version:
            self._version = version
            self._drop(len(self._recordings))
        form = autocast_dtype(self._lm.device), last_only, *_form_of(prefix)
        if form not in self._forms:
            self._forms[form] = None if prefix is None else _fixed_prefix(prefix, 2), last_only
        key = shape, *form
        found = self._recordings.get(key)
        if found is None:
            if len(self._recordings) >= self.capacity:
                self._drop(1)
            found = self._recordings[key] = _Recording(self._lm, self._recorder, shape, prefix, last_only)
            self.num_captures += 1
        self._recordings.move_to_end(key)
        return found

    def _drop(self, count: int) -> None:
        """Drop the recordings of the oldest use once the device has done with them."""
        self._recorder.finish()
        for _ in range(count):
            self._recordings.popitem(last=False)
