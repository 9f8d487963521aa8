"""Keys and values in front of every packed sequence, in every attention layer of the language model.

They stand for a text that all sequences share, which the model then reads once, or they are a deep prefix, which
M-Former writes or training finds (Li and Liang, arXiv:2101.00190; Liu et al., arXiv:2110.07602).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from laser_fast.ops.prefix_kv import inject_prefix_kv


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one attention layer: heads H_kv, head size d, and the root mean square of both."""

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
    """P keys and values per sequence and layer; where the model rotates keys, these are rotated already."""

    keys: tuple[Tensor, ...]  # of every layer [B, P, H_kv, d], [1, P, H_kv, d] (shared), or a pool of such rows
    values: tuple[Tensor, ...]
    slots: Tensor | None = None  # int32 [B], the row of the pool for each sequence; None = no pool

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
        """B, or 1 where all sequences share the prefix."""
        return self.keys[0].shape[0] if self.slots is None else self.slots.shape[0]

    def inject(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H_kv, d] of one layer with this prefix in front of every sequence."""
        # one slot may serve all sequences
        index = None if self.slots is None else self.slots.expand(cu_seqlens.shape[0] - 1)
        prefix_key, prefix_value = self.keys[layer].to(key.dtype), self.values[layer].to(value.dtype)
        return inject_prefix_kv(key, value, prefix_key, prefix_value, cu_seqlens, prefix_index=index)[:2]

    def then(self, following: "KeyValuePrefix") -> "KeyValuePrefix":
        """This prefix with another behind it, of which one may be shared; no pools."""
        size = max(self.batch_size, following.batch_size)
        keys = zip(self.keys, following.keys, strict=True)
        values = zip(self.values, following.values, strict=True)
        return KeyValuePrefix(
            tuple(_joined(size, *pair) for pair in keys), tuple(_joined(size, *pair) for pair in values)
        )


def length_of(prefix: KeyValuePrefix | None) -> int:
    """P, 0 without a prefix."""
    return 0 if prefix is None else prefix.length


def _joined(size: int, *parts: Tensor) -> Tensor:
    return torch.cat([part.expand(size, *part.shape[1:]) for part in parts], dim=1)
