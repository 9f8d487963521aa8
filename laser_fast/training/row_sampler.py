"""Which training rows an epoch takes, in which order, and in which batches."""

import math
from collections.abc import Iterator

import numpy as np


class RowSampler:
    """Draws the rows of each epoch without repeating one before all were drawn; the same seed gives the same rows.

    Args:
        num_rows: rows there are.
        rows_per_epoch: rows an epoch takes; None = all.
        seed: of the shuffles.
    """

    def __init__(self, num_rows: int, rows_per_epoch: int | None, seed: int) -> None:
        self.num_rows = num_rows
        self.rows_per_epoch = num_rows if rows_per_epoch is None else rows_per_epoch
        self.seed = seed

    def epoch(self, index: int) -> np.ndarray:
        """Row numbers of epoch `index`: int64 [rows_per_epoch]."""
        first = index * self.rows_per_epoch
        wanted = np.arange(first, first + self.rows_per_epoch)
        rows = np.empty(self.rows_per_epoch, dtype=np.int64)
        for shuffle in np.unique(wanted // self.num_rows):
            order = np.random.default_rng([self.seed, int(shuffle)]).permutation(self.num_rows)
            here = wanted // self.num_rows == shuffle
            rows[here] = order[wanted[here] % self.num_rows]
        return rows

    def batches(self, epoch: int, batch_size: int) -> Iterator[np.ndarray]:
        """The rows of an epoch, `batch_size` at a time, the last batch may be smaller."""
        rows = self.epoch(epoch)
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]

    def num_batches(self, batch_size: int) -> int:
        """Batches of one epoch."""
        return math.ceil(self.rows_per_epoch / batch_size)
