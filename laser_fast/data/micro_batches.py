"""Splitting a batch by packed tokens, so that each part fits through the language model at once."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from laser_fast.data.batches import PackedBatch

VirtualTokens = Callable[[PackedBatch], int]
"""Tokens every sequence of a batch has in the language model beside its text (prefix, suffix, instruction)."""


@dataclass(frozen=True, eq=False)
class RowTokens:
    """Packed tokens of every row of a batch, and of the positives the rows share.

    Args:
        users: int64 [B].
        positives: int64 [P].
        positive_of: int64 [B, 1 + n], which of `positives` a row needs (its target, its negatives), none twice in a
            row; [B, 0] where the batch brings none.
    """

    users: np.ndarray
    positives: np.ndarray
    positive_of: np.ndarray

    @property
    def total(self) -> int:
        """Tokens of the whole batch; a positive that several rows share is counted once."""
        return int(self.users.sum() + self.positives.sum())

    @property
    def rows(self) -> np.ndarray:
        """Tokens of every row on its own, its positive included: int64 [B]."""
        return np.asarray(self.users + self.positives[self.positive_of].sum(axis=1))

    def split(self, limit: int) -> list[np.ndarray]:
        """Rows of parts of at most `limit` tokens each: first fit, longest row first, ties by row.

        The same batch always gives the same parts. Rows rise within a part, parts are in the order of their first
        row, and a row above the limit is a part of its own.
        """
        needs = [set(row) for row in self.positive_of.tolist()]
        spent: list[int] = []
        parts: list[list[int]] = []
        positives: list[set[int]] = []  # of each part
        for row in np.argsort(-self.rows, kind="stable").tolist():
            for part in range(len(parts) + 1):
                if part == len(parts):  # it fits into no part
                    spent.append(0)
                    parts.append([])
                    positives.append(set())
                more = sum(int(self.positives[one]) for one in needs[row] - positives[part])
                if not parts[part] or spent[part] + self.users[row] + more <= limit:
                    break
            spent[part] += int(self.users[row]) + more
            parts[part].append(row)
            positives[part] |= needs[row]
        return sorted((np.sort(np.asarray(part, dtype=np.int64)) for part in parts), key=lambda part: int(part[0]))


def row_tokens(batch: PackedBatch, virtual_tokens: VirtualTokens) -> RowTokens:
    """Count the packed tokens of a batch: text and virtual ones, of its users and of its positives."""
    users = batch.token_lengths + virtual_tokens(batch)
    if batch.positives is None:
        return RowTokens(users, np.zeros(0, dtype=np.int64), np.zeros((len(users), 0), dtype=np.int64))
    positives = batch.positives.token_lengths + virtual_tokens(batch.positives)
    return RowTokens(users, positives, batch.places)
