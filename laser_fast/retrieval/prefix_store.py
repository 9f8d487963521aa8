"""Prefixes kept between requests: a bounded pool of keys and values, least recently used out first.

A user with an unchanged history has an unchanged prefix, so M-Former and the language model's pass over the prefix need
not run again. A pool belongs to one version of the weights.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laser_fast.data.batches import PackedBatch
from laser_fast.data.sequences import PackedSequences
from laser_fast.lm.execution.cuda_graphs import CudaGraphs, Recorder
from laser_fast.lm.key_value_prefix import KeyValuePrefix
from laser_fast.ops.precision import autocast_dtype
from laser_fast.retrieval.inner_product import packed_tensors


class PrefixStore:
    """Pool of at most `capacity` prefixes, allocated at the first use; a copy of the store is empty.

    Threads may share it, on streams of their own: no row is overwritten while a request reads it. A prefix takes
    2 P H_kv d numbers a layer (4 MiB for 32 tokens of an 8B Llama in half precision).

    Attributes:
        hits, misses: prefixes served from the pool, and written.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"PrefixStore: capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.hits = 0
        self.misses = 0
        self._pool = _Pool(capacity)
        self._version: Hashable = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pool.slot_of)

    def __reduce__(self) -> tuple[Any, ...]:
        return PrefixStore, (self.capacity,)

    def clear(self) -> None:
        """Forget all prefixes and their memory; a running request keeps those it reads."""
        with self._lock:
            self._pool = _Pool(self.capacity)

    @contextmanager
    def fetch(
        self, names: Sequence[Hashable], version: Hashable, write: Callable[[list[int]], KeyValuePrefix]
    ) -> Iterator[KeyValuePrefix]:
        """The prefixes of a batch in the order of its names, to be read within the block; missing ones are written.

        A batch with more distinct names than the pool has free slots is written as a whole and not kept.

        Args:
            names: what each prefix depends on, B of them.
            version: of the weights; a new one empties the pool.
            write: makes the prefixes of some positions of `names` as one batch of [len(positions), P, H_kv, d] a layer.
        """
        position_of: dict[Hashable, int] = {}  # where each name stands first
        for position, name in enumerate(names):
            position_of.setdefault(name, position)
        with self._lock:
            if version != self._version:
                self._pool.slot_of.clear()
                self._version = version
            pool = self._pool
            held = pool.pin((version, name) for name in position_of)
        try:
            missing = [name for name in position_of if (version, name) not in held]
            if missing and len(position_of) <= self.capacity:
                # without the lock, so that others are served; two that miss the same name both write it
                written = write([position_of[name] for name in missing])
                with self._lock:
                    if pool.takes(written):
                        held |= pool.put([(version, name) for name in missing], written)
                    elif self._pool is pool:
                        self._pool = _Pool(self.capacity)  # for the batches after this one
            kept = len(held) == len(position_of)
            with self._lock:
                self.hits += len(names) - len(missing) if kept else 0
                self.misses += len(missing) if kept else len(names)
            if kept:
                yield pool.prefix([held[version, name] for name in names])
            else:
                yield write(list(range(len(names))))
        finally:
            with self._lock:
                pool.unpin(held.values())


def fetch_prefixes(
    store: PrefixStore, batch: PackedBatch, version: Hashable, write: Callable[[PackedBatch], KeyValuePrefix]
) -> AbstractContextManager[KeyValuePrefix]:
    """`PrefixStore.fetch` for users, named by history, instruction and precision; `write` gets those it lacks."""
    items, bounds = batch.items.cpu().numpy(), batch.cu_seqlens.tolist()
    made_in = batch.instruction, autocast_dtype(batch.items.device)
    names = [(*made_in, items[start:end].tobytes()) for start, end in pairwise(bounds)]
    read = PackedSequences(items, np.asarray(bounds, dtype=np.int32))

    def write_some(positions: list[int]) -> KeyValuePrefix:
        rows, offsets = packed_tensors(read.select(np.asarray(positions)), batch.items.device)
        return write(replace(batch, items=rows, cu_seqlens=offsets))

    return store.fetch(names, version, write_some)


class _Pool:
    """Keys and values of every layer in slots; callers hold the lock of the store."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slot_of: OrderedDict[Hashable, int] = OrderedDict()  # oldest use first
        self.tensors: tuple[Tensor, ...] = ()  # keys of all layers, then values, [capacity, P, H_kv, d] each
        self._pins: Counter[int] = Counter()  # requests that read a slot
        self._turns = Recorder()

    def pin(self, keys: Iterable[Hashable]) -> dict[Hashable, int]:
        """The slots of the keys that are here, not overwritten until `unpin`."""
        held = {key: self.slot_of[key] for key in keys if key in self.slot_of}
        for key, slot in held.items():
            self.slot_of.move_to_end(key)
            self._pins[slot] += 1
        with self._turns.in_turn():  # the device reads after what was written before
            return held

    def unpin(self, slots: Iterable[int]) -> None:
        """Release slots whose readers have been called."""
        self._pins.subtract(slots)
        self._pins = +self._pins
        with self._turns.in_turn():  # the device writes after what was read before
            pass

    def takes(self, written: KeyValuePrefix) -> bool:
        return not self.tensors or [_form(one) for one in self.tensors] == [_form(one) for one in _tensors(written)]

    def put(self, keys: Sequence[Hashable], written: KeyValuePrefix) -> dict[Hashable, int]:
        """Copy rows of new keys into free slots or the longest unused, and pin all; nothing if too many are pinned."""
        new = [place for place, key in enumerate(keys) if key not in self.slot_of]
        wanted, slots = set(keys), list[int]()
        if len(self.slot_of) < self.capacity:
            taken = {*self.slot_of.values(), *self._pins}
            slots += islice((slot for slot in range(self.capacity) if slot not in taken), len(new))
        unused = (key for key, slot in self.slot_of.items() if not self._pins[slot] and key not in wanted)
        evicted = list(islice(unused, len(new) - len(slots)))
        if len(slots) + len(evicted) < len(new):
            return {}
        slots += [self.slot_of.pop(key) for key in evicted]
        if new:
            self._copy(new, slots, written)
        self.slot_of.update(zip((keys[place] for place in new), slots, strict=True))
        return self.pin(keys)

    def _copy(self, places: list[int], slots: list[int], written: KeyValuePrefix) -> None:
        """Copy rows of `written`, or its only one, into slots."""
        tensors = _tensors(written)
        if not self.tensors:
            self.tensors = tuple(tensor.new_empty(self.capacity, *tensor.shape[1:]) for tensor in tensors)
            device = tensors[0].device
            self._turns = CudaGraphs(device) if device.type == "cuda" else Recorder()
        source, target = (torch.tensor(rows, device=tensors[0].device) for rows in (places, slots))
        with self._turns.in_turn():
            for kept, tensor in zip(self.tensors, tensors, strict=True):
                if tensor.shape[0] == 1:
                    rows = tensor.expand(len(slots), *tensor.shape[1:])
                else:
                    rows = tensor.index_select(0, source)
                kept.index_copy_(0, target, rows)

    def prefix(self, slots: list[int]) -> KeyValuePrefix:
        layers = len(self.tensors) // 2
        rows = torch.tensor(slots, dtype=torch.int32).to(self.tensors[0].device)
        return KeyValuePrefix(self.tensors[:layers], self.tensors[layers:], rows)


def _tensors(prefix: KeyValuePrefix) -> tuple[Tensor, ...]:
    return *prefix.keys, *prefix.values


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape[1:]), tensor.dtype, tensor.device
