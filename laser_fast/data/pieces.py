"""Going through long arrays piece by piece, so that no more of a file is in memory than one piece."""

import hashlib
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

PIECE = 2**20
"""Entries of a piece: 8 MiB of timestamps."""


def pieces(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Start and view of one piece of a 1-D array after the other; an empty array has none.

    If the array is a file mapped for reading, the system gets the pages of every piece back when the next one is asked
    for: they are in no process's memory any more, and are read again where somebody looks at them.
    """
    mapping = _mapping(array)
    for start in range(0, len(array), PIECE):
        yield start, array[start : start + PIECE]
        if mapping is not None:
            mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    """The mapping whose pages can be dropped without loss; None for all other arrays."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.mode != "r":  # a private copy of a page would be lost
            return None
        base = base.base
    return base if isinstance(base, mmap.mmap) and hasattr(base, "madvise") else None


def update_with_array(digest: "hashlib._Hash", array: np.ndarray, dtype: str) -> None:
    """Feed the bytes of a 1-D array to a hash, as `dtype` with its byte order, so that machines agree."""
    for _, piece in pieces(array):
        digest.update(np.ascontiguousarray(piece, dtype=dtype).data)
