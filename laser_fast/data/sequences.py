"""Packed item sequences: one flat array of items and `cu_seqlens`, the running sum of the sequence lengths."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_INT32_MAX = np.iinfo(np.int32).max


def segment_positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of `arange(start, start + length)` over all segments, int64 [lengths.sum()]."""
    lengths = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    shift = np.asarray(starts, dtype=np.int64) - (ends - lengths)
    return np.asarray(np.arange(total, dtype=np.int64) + np.repeat(shift, lengths))


def cu_seqlens_of(lengths: np.ndarray) -> np.ndarray:
    """int32 [B+1] running sum of B lengths, starting at 0.

    Raises:
        ValueError: the sum does not fit into int32.
    """
    running = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=running[1:])
    if running[-1] > _INT32_MAX:
        raise ValueError(f"cu_seqlens_of: the lengths must sum to at most {_INT32_MAX}, got {running[-1]}")
    return running.astype(np.int32)


def check_range(values: np.ndarray, count: int, what: str) -> None:
    """Raise ValueError, which names `what`, unless all integers lie in 0..count-1."""
    if values.size and (values.min() < 0 or values.max() >= count):
        worst = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{what} must lie in 0..{count - 1}, got {worst}")


def row_indices(rows: np.ndarray | Sequence[int], count: int, function: str) -> np.ndarray:
    """Rows named by indices, or by a mask of `count` entries, as int64 indices from 0 to `count - 1`.

    Raises:
        TypeError: neither integers nor a mask.
        ValueError: a mask of another length, or an index out of range; the message begins with `function`.
    """
    index = np.asarray(rows)
    if index.dtype == np.bool_:
        if index.shape != (count,):
            raise ValueError(f"{function}: a mask must have one entry per row ({count}), got shape {index.shape}")
        return np.flatnonzero(index)
    if index.size == 0:
        return np.zeros(0, dtype=np.int64)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise TypeError(f"{function}: rows must be a 1-D array of integers, got {index.dtype} of shape {index.shape}")
    check_range(index, count, f"{function}: rows")
    return index.astype(np.int64)


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """B sequences of item indices, chronological (oldest first), empty ones allowed.

    Args:
        items: int64 [N].
        cu_seqlens: int32 [B+1]; sequence b is `items[cu_seqlens[b]:cu_seqlens[b + 1]]`.

    Raises:
        TypeError: an array has another dtype.
        ValueError: `cu_seqlens` does not run from 0 to N without going down.
    """

    items: np.ndarray
    cu_seqlens: np.ndarray

    def __post_init__(self) -> None:
        if self.items.dtype != np.int64 or self.cu_seqlens.dtype != np.int32:
            raise TypeError(
                "PackedSequences: items must be int64 and cu_seqlens int32, "
                f"got {self.items.dtype} and {self.cu_seqlens.dtype}"
            )
        if self.items.ndim != 1 or self.cu_seqlens.ndim != 1 or not self.cu_seqlens.size:
            raise ValueError(
                "PackedSequences: items must be [N] and cu_seqlens [B+1], "
                f"got shapes {self.items.shape} and {self.cu_seqlens.shape}"
            )
        if self.cu_seqlens[0] != 0 or self.cu_seqlens[-1] != len(self.items) or (np.diff(self.cu_seqlens) < 0).any():
            raise ValueError(
                f"PackedSequences: cu_seqlens must rise from 0 to {len(self.items)}, got {self.cu_seqlens.tolist()[:8]}"
                f"..{self.cu_seqlens[-1]}"
            )

    @classmethod
    def singles(cls, items: np.ndarray | Sequence[int]) -> "PackedSequences":
        """A sequence of one for every item."""
        return cls(np.asarray(items, dtype=np.int64), np.arange(len(items) + 1, dtype=np.int32))

    @classmethod
    def from_lists(cls, sequences: Iterable[Sequence[int] | np.ndarray]) -> "PackedSequences":
        """Pack lists of item indices, e.g. `PackedSequences.from_lists([[3, 1], [], [2]])`."""
        rows = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        items = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        return cls(items, cu_seqlens_of(np.array([len(row) for row in rows], dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Items of one sequence, a view; negative rows count from the end."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"PackedSequences: row must lie in 0..{len(self) - 1}, got {row}")
        row %= len(self)
        return self.items[self.cu_seqlens[row] : self.cu_seqlens[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of every sequence, int64 [B]."""
        return np.diff(self.cu_seqlens).astype(np.int64)

    def select(self, rows: np.ndarray | Sequence[int]) -> "PackedSequences":
        """The sequences `rows` (indices, repeats allowed, or a boolean mask) in that order, as a copy."""
        index = row_indices(rows, len(self), "PackedSequences.select")
        lengths = self.lengths[index]
        positions = segment_positions(self.cu_seqlens[:-1][index], lengths)
        return PackedSequences(self.items[positions], cu_seqlens_of(lengths))

    def truncate_left(self, max_length: int) -> "PackedSequences":
        """The newest `max_length` items of every sequence; the same object if none is longer."""
        if max_length < 0:
            raise ValueError(f"PackedSequences.truncate_left: max_length must be at least 0, got {max_length}")
        lengths = self.lengths
        if not len(self) or lengths.max() <= max_length:
            return self
        kept = np.minimum(lengths, max_length)
        return PackedSequences(self.items[segment_positions(self.cu_seqlens[1:] - kept, kept)], cu_seqlens_of(kept))

    def to_lists(self) -> list[list[int]]:
        """The sequences as Python lists, for reading and tests."""
        return [self[row].tolist() for row in range(len(self))]


@dataclass(frozen=True, eq=False)
class EvaluationRows:
    """B questions "what comes next?": the user, the history before it, and the item that came.

    Args:
        users, targets: int64 [B], indices of users and items.
        histories: B of them, oldest item first.
        folds: int64 [B], which fold of a cross-fitted recommender has not seen the row, -1 where that does not matter;
            None = for no row.
    """

    users: np.ndarray
    histories: PackedSequences
    targets: np.ndarray
    folds: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.users.dtype == self.targets.dtype == np.int64:
            raise TypeError(
                f"EvaluationRows: users and targets must be int64, got {self.users.dtype} and {self.targets.dtype}"
            )
        counts = (self.users.shape, self.targets.shape, (len(self.histories),))
        if len(set(counts)) != 1:
            raise ValueError(
                "EvaluationRows: users, targets and histories must have one length, "
                f"got {counts[0]}, {counts[1]} and {counts[2]}"
            )
        if self.folds is not None and (self.folds.dtype != np.int64 or self.folds.shape != self.users.shape):
            raise ValueError(
                f"EvaluationRows: folds must be one int64 for each of the {len(self.users)} rows, "
                f"got {self.folds.dtype} of shape {self.folds.shape}"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, rows: np.ndarray | Sequence[int]) -> "EvaluationRows":
        """The rows `rows` (indices, repeats allowed, or a boolean mask) in that order, as a copy."""
        index = row_indices(rows, len(self), "EvaluationRows.select")
        folds = None if self.folds is None else self.folds[index]
        return EvaluationRows(self.users[index], self.histories.select(index), self.targets[index], folds)
