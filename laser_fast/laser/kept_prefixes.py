"""Prefixes of users kept between requests, as keys and values of every layer."""

from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from laser_fast.data.batches import PackedBatch
from laser_fast.data.sequences import PackedSequences
from laser_fast.lm.key_value_prefix import KeyValuePrefix
from laser_fast.ops.precision import autocast_dtype
from laser_fast.retrieval.prefix_store import PrefixStore

if TYPE_CHECKING:
    from laser_fast.laser.model import LaserModel


class KeptPrefixes:
    """What stands in front of a user's text, by what M-Former read, the precision and the version of the weights.

    Any change of a weight (an optimizer step, a loaded state) empties it, see `WeightsVersion`.

    Args:
        model: whose prefixes are kept.
        capacity: users kept.

    Attributes:
        store: the pool; its `hits` and `misses` tell what it saved.

    Raises:
        ValueError: a capacity below 1, a model without a prefix, or one with input embeddings as prefix of a
            bidirectional language model (such a prefix sees the text, so it is not the user's alone).
    """

    def __init__(self, model: "LaserModel", capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"keep_prefixes: capacity must not be negative, got {capacity}")
        if model.mformer is None and model.linear_prefix is None and model.bituning.prefix_tokens is None:
            raise ValueError("keep_prefixes: the model must have a prefix, got none")
        if model.deep_prefix is None and not model.lm.causal:
            raise ValueError(
                'keep_prefixes: prefix_mode must be "kv" for a bidirectional language model, got "embedding"'
            )
        self.model = model
        self.store = PrefixStore(capacity)

    def of(self, batch: PackedBatch) -> AbstractContextManager[KeyValuePrefix]:
        """Keys and values of instruction and prefix of a batch of users, to be read inside of `with` alone.

        What the store lacks is written.
        """
        items, bounds = batch.items.cpu().numpy(), batch.cu_seqlens.tolist()
        made_in = batch.instruction, autocast_dtype(self.model.device)
        names = [(*made_in, items[start:end].tobytes()) for start, end in pairwise(bounds)]
        read = PackedSequences(items, np.asarray(bounds, dtype=np.int32))

        def write(positions: list[int]) -> KeyValuePrefix:
            wanted = read.select(np.asarray(positions))
            part = replace(
                batch,
                items=torch.from_numpy(wanted.items).to(batch.items.device),
                cu_seqlens=torch.from_numpy(wanted.cu_seqlens).to(batch.items.device),
            )
            tokens, injected, _ = self.model.write_prefix(part)
            if tokens is not None:
                run = self.model.lm.key_values(tokens, injected)
                injected = run if injected is None else injected.then(run)
            assert injected is not None  # the model has a prefix
            return injected

        return self.store.fetch(names, self.model.weights.now(), write)
