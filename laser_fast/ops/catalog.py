"""What both catalogue operations do: check users and items, walk over chunks of items, scale rows to length 1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laser_fast.ops.checks import check_dimensions, check_floating, check_one_device, check_positive

# Elements of one [B, chunk] score matrix, and of one [chunk, d] slice of items in the accumulation dtype.
# CPU: 2 MB of float32 stays in the cache (256 users x 100k items x 64, one core: top-k 0.40 s at 2**17, 0.21 s at
# 2**19, 0.33 s at 2**22). GPU: 64 MB, so that launches do not dominate; not tuned, since kernels take over there.
_CHUNK_ELEMENTS = {"cpu": 2**19}
_CHUNK_ELEMENTS_GPU = 2**24

# rows shorter than this count as zero: their cosine is 0 and so is their gradient
SMALLEST_NORM = 1e-12


def check_catalog(function: str, users: Tensor, items: Tensor, temperature: float) -> None:
    """Check users [B, d], items [I, d] and the number that divides their scores."""
    check_floating(function, users=users, items=items)
    check_dimensions(function, 2, users=users, items=items)
    check_one_device(function, users=users, items=items)
    check_positive(function, temperature=temperature)
    if users.shape[1] != items.shape[1]:
        found = f"{tuple(users.shape)} and {tuple(items.shape)}"
        raise ValueError(f"{function}: users and items must have one width, got {found}")


def scaled_users(users: Tensor, wide: torch.dtype, temperature: float, normalize: bool) -> Tensor:
    """Users [B, d] whose products with items, of length 1 if `normalize`, are the scores."""
    return users.to(wide) * (inverse_norms(users, wide) / temperature if normalize else 1.0 / temperature)


def item_chunks(users: Tensor, items: Tensor) -> Iterator[tuple[int, int]]:
    """Bounds `(start, stop)` of consecutive chunks of one item or more, so that chunk x max(B, d) stays bounded."""
    elements = _CHUNK_ELEMENTS.get(users.device.type, _CHUNK_ELEMENTS_GPU)
    num_items, step = items.shape[0], max(1, elements // max(*users.shape, 1))
    for start in range(0, num_items, step):
        yield start, min(start + step, num_items)


def chunk_scores(scaled: Tensor, items: Tensor, normalize: bool) -> Iterator[tuple[int, Tensor]]:
    """The first item and the scores [B, chunk] of every chunk, for users of `scaled_users`."""
    for start, stop in item_chunks(scaled, items):
        chunk = items[start:stop]
        scores = scaled @ chunk.to(scaled.dtype).T
        if normalize:
            scores *= inverse_norms(chunk, scaled.dtype).T
        yield start, scores


def locate(items: Tensor, start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Column of each item in a chunk, and whether it lies there; the others get a column of the chunk as well, so that
    no shape depends on them and a GPU is not waited for."""
    column = items - start
    return column.clamp(0, num_columns - 1), (column >= 0) & (column < num_columns)


def inverse_norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 / |row|`, 0 for a zero row: [R, 1] in `dtype`, without a copy of the rows."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=dtype)
    return torch.where(norms > SMALLEST_NORM, norms.reciprocal(), 0.0)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows at length 1, zero rows as they are; differentiable, with gradient 0 for a zero row."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    nonzero = norms > SMALLEST_NORM
    units: Tensor = rows / norms.where(nonzero, 1.0) * nonzero
    return units
