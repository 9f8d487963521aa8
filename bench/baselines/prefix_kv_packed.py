"""A prefix of keys and values in front of every sequence, as one would write it for packed and for padded batches."""

from collections.abc import Sequence

import torch
from torch import Tensor


def inject_cat(text: Tensor, prefix: Tensor, lengths: Sequence[int]) -> Tensor:
    """One `torch.cat` of all prefixes and texts in turn: [T, Hkv, d] and [B or 1, P, Hkv, d] -> [T + B P, Hkv, d]."""
    pieces = []
    for b, part in enumerate(text.split(list(lengths))):
        pieces += [prefix[b if len(prefix) > 1 else 0], part]
    return torch.cat(pieces)


def inject_cat_loop(text: Tensor, prefix: Tensor, lengths: Sequence[int]) -> Tensor:
    """A `torch.cat` per sequence, and one of the results."""
    parts = enumerate(text.split(list(lengths)))
    return torch.cat([torch.cat([prefix[b if len(prefix) > 1 else 0], part]) for b, part in parts])


def inject_index_copy(text: Tensor, prefix: Tensor, text_rows: Tensor, prefix_rows: Tensor) -> Tensor:
    """Two `index_copy_` into a new buffer; the rows are known beforehand."""
    out = text.new_empty(len(text_rows) + len(prefix_rows), *text.shape[1:])
    num_sequences = len(prefix_rows) // prefix.shape[1]
    each = prefix.expand(num_sequences, *prefix.shape[1:]).flatten(0, 1)
    return out.index_copy_(0, text_rows, text).index_copy_(0, prefix_rows, each)


def inject_padded(text: Tensor, prefix: Tensor) -> Tensor:
    """As prefix tuning meets a cache: the prefix is expanded to the batch, and every layer concatenates.

    Text [B, Hkv, L, d] and prefix [B or 1, Hkv, P, d] -> [B, Hkv, P + L, d].
    """
    return torch.cat([prefix.expand(len(text), -1, -1, -1), text], dim=2)
