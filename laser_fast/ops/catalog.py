"""What the two catalogue operations share: chunks of items small enough to hold their scores, and row norms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one [B, chunk] score matrix, and of one [chunk, d] slice of items in the accumulation dtype.
# CPU: 2 MB of float32 stays in the cache (256 users x 100k items x 64, one core: top-k 0.40 s at 2**17, 0.21 s at
# 2**19, 0.33 s at 2**22). GPU: 64 MB, so that launches do not dominate; not tuned, since kernels take over there.
_CHUNK_ELEMENTS = {"cpu": 2**19}
_CHUNK_ELEMENTS_GPU = 2**24

# rows shorter than this count as zero: their cosine is 0 and so is their gradient
SMALLEST_NORM = 1e-12


def item_chunks(users: Tensor, items: Tensor) -> Iterator[tuple[int, int]]:
    """Bounds `(start, stop)` of consecutive chunks of items, for users [B, d] and items [I, d].

    `(stop - start) * max(B, d)` stays bounded, but a chunk has at least one item.
    """
    elements = _CHUNK_ELEMENTS.get(users.device.type, _CHUNK_ELEMENTS_GPU)
    num_items, step = items.shape[0], max(1, elements // max(*users.shape, 1))
    for start in range(0, num_items, step):
        yield start, min(start + step, num_items)


def inverse_norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 / |row|`, 0 for a zero row, as [R, 1] in `dtype`; makes no copy of the rows."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=dtype)
    return torch.where(norms > SMALLEST_NORM, norms.reciprocal(), 0.0)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows at length 1, zero rows as they are; differentiable, with gradient 0 for a zero row."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    nonzero = norms > SMALLEST_NORM
    units: Tensor = rows / norms.where(nonzero, 1.0) * nonzero
    return units
