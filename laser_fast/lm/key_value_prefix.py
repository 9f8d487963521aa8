"""Keys and values that stand in front of every packed sequence, in every attention layer of the language model.

Two things become such a prefix: text that is the same for everybody (its keys and values are computed once and
injected, instead of running the text through the model with every sequence), and a deep prefix, whose keys and values
are written straight by M-Former or learned (Li and Liang, arXiv:2101.00190; Liu et al., arXiv:2110.07602).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from laser_fast.ops.prefix_kv import inject_prefix_kv


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one attention layer: heads H_kv, head size d, and the root mean square of either."""

    num_heads: int
    head_size: int
    key_rms: float
    value_rms: float

    @property
    def width(self) -> int:
        """H_kv d."""
        return self.num_heads * self.head_size


@dataclass(frozen=True)
class KeyValuePrefix:
    """P keys and values per sequence and layer, rotated as the model rotates keys where it does.

    Keys and values are per layer [B, P, H_kv, d] (one per sequence) or [1, P, H_kv, d] (shared); with `slots` a pool.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    slots: Tensor | None = None  # int32 [B], the row of the pool that belongs to each sequence; None = no pool

    def __post_init__(self) -> None:
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                "KeyValuePrefix: keys and values must be given for the same layers, at least one, "
                f"got {len(self.keys)} and {len(self.values)}"
            )

    @property
    def length(self) -> int:
        """P."""
        return self.keys[0].shape[1]

    @property
    def batch_size(self) -> int:
        """B, or 1 where all sequences share it."""
        return self.keys[0].shape[0] if self.slots is None else self.slots.shape[0]

    def of_layer(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B or 1, P, H_kv, d] of one layer."""
        key, value = self.keys[layer].to(dtype), self.values[layer].to(dtype)
        return (key, value) if self.slots is None else (key[self.slots], value[self.slots])

    def inject(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H_kv, d] of one layer with this prefix in front of every sequence; a pool stays whole."""
        index = self.slots
        if index is not None:
            index = index.expand(cu_seqlens.shape[0] - 1)  # one slot serves all sequences
        prefix_key, prefix_value = self.keys[layer].to(key.dtype), self.values[layer].to(value.dtype)
        return inject_prefix_kv(key, value, prefix_key, prefix_value, cu_seqlens, prefix_index=index)[:2]

    def then(self, following: "KeyValuePrefix") -> "KeyValuePrefix":
        """This prefix with another behind it; of two batch sizes the one that is not 1. Not for pools."""
        return KeyValuePrefix(
            tuple(_behind(one, other) for one, other in zip(self.keys, following.keys, strict=True)),
            tuple(_behind(one, other) for one, other in zip(self.values, following.values, strict=True)),
        )


def _behind(one: Tensor, other: Tensor) -> Tensor:
    size = max(one.shape[0], other.shape[0])
    return torch.cat([one.expand(size, *one.shape[1:]), other.expand(size, *other.shape[1:])], dim=1)
