"""Prefixes kept between requests: a bounded pool of keys and values, least recently used out first.

A user who comes back with the same history gets the same prefix; what made it (M-Former, and for input embeddings the
language model's pass over the prefix tokens) need not run again. A pool belongs to one version of the weights.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from laser_fast.nn.prefix_kv import KeyValuePrefix


class PrefixStore:
    """Pool of at most `capacity` prefixes, allocated at the first use.

    Args:
        capacity: prefixes kept; one takes P times 2 H_kv d numbers a layer (4 MiB for 32 tokens of an 8B Llama in half
            precision).

    Attributes:
        hits, misses: prefixes served from the pool and written since the start.

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"PrefixStore: capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.hits = 0
        self.misses = 0
        self._slot_of: OrderedDict[Hashable, int] = OrderedDict()  # oldest use first
        self._version: Hashable = None
        self._pool: KeyValuePrefix | None = None

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def num_bytes(self) -> int:
        """Memory of the pool."""
        tensors = () if self._pool is None else (*self._pool.keys, *self._pool.values)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def fetch(
        self, names: Sequence[Hashable], version: Hashable, write: Callable[[list[int]], KeyValuePrefix]
    ) -> KeyValuePrefix:
        """The prefixes of a batch, those that are not in the pool written first.

        Args:
            names: what each prefix depends on, B of them.
            version: of the weights; another one than before empties the pool.
            write: makes the prefixes of some positions of `names` as one batch of [len(positions), P, H_kv, d] a layer.

        Returns:
            The prefixes of the B sequences, in their order: slots of the pool, or, where the batch has more distinct
            ones than the pool holds, written for this batch and not kept.
        """
        if version != self._version:
            self._slot_of.clear()
            self._version = version
        distinct: dict[Hashable, int] = {}  # where each name stands first
        for position, name in enumerate(names):
            distinct.setdefault(name, position)
        if len(distinct) > self.capacity:
            self.misses += len(names)
            return write(list(range(len(names))))
        missing = [name for name in distinct if name not in self._slot_of]
        self.hits += len(names) - len(missing)
        self.misses += len(missing)
        for name in distinct:
            if name in self._slot_of:
                self._slot_of.move_to_end(name)
        if missing:
            self._keep(missing, write([distinct[name] for name in missing]))
        assert self._pool is not None
        slots = torch.tensor([self._slot_of[name] for name in names], dtype=torch.int32)
        return KeyValuePrefix(self._pool.keys, self._pool.values, slots.to(self._pool.keys[0].device))

    def _keep(self, names: list[Hashable], written: KeyValuePrefix) -> None:
        """Copy into slots that are free or longest unused; the names of the running batch are the latest used."""
        if self._pool is None or not _same_rows(self._pool, written):
            self._slot_of.clear()
            self._pool = KeyValuePrefix(
                tuple(key.new_empty(self.capacity, *key.shape[1:]) for key in written.keys),
                tuple(value.new_empty(self.capacity, *value.shape[1:]) for value in written.values),
            )
        slots = []
        free = iter(sorted(set(range(self.capacity)) - set(self._slot_of.values())))
        for name in names:
            slot = next(free, None)
            if slot is None:
                slot = self._slot_of.popitem(last=False)[1]
            slots.append(slot)
            self._slot_of[name] = slot
        rows = torch.tensor(slots, device=self._pool.keys[0].device)
        for kept, new in zip((*self._pool.keys, *self._pool.values), (*written.keys, *written.values), strict=True):
            kept.index_copy_(0, rows, new.expand(len(slots), *new.shape[1:]))


def _same_rows(pool: KeyValuePrefix, written: KeyValuePrefix) -> bool:
    def form(tensor: Tensor) -> tuple[object, ...]:
        return (tuple(tensor.shape[1:]), tensor.dtype, tensor.device)

    return [form(key) for key in pool.keys] == [form(key) for key in written.keys]
