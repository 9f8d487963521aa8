"""Negatives of training rows, drawn uniformly from the items a user has nothing to do with."""

from dataclasses import dataclass

import numpy as np

from laser_fast.data.sequences import PackedSequences


@dataclass(frozen=True, eq=False)
class NegativeSampler:
    """Draws `num_negatives` distinct items for a row, none of them in the user's sequence of `train` (so neither in the
    history of the row nor its target).

    A row's negatives are a function of the seed (not negative), the epoch and the row's number alone: they do not
    depend on the batch or the process the row is in, and a run that is resumed draws them again.
    """

    train: PackedSequences
    num_items: int
    num_negatives: int
    seed: int

    def draw(self, users: np.ndarray, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Negatives of the rows with the numbers `rows` [B], of the sequences `users` [B]: int64 [B, n], in no order.

        Raises:
            ValueError: a user has fewer than n items left.
        """
        drawn = np.empty((len(rows), self.num_negatives), dtype=np.int64)
        for index, (user, row) in enumerate(zip(users.tolist(), rows.tolist(), strict=True)):
            own = np.unique(self.train[user])
            left = self.num_items - len(own)
            if left < self.num_negatives:
                raise ValueError(
                    f"NegativeSampler: objective.num_negatives must be at most {left}, the items that are not in the "
                    f"sequence of user {user}, got {self.num_negatives}"
                )
            random = np.random.default_rng([self.seed, epoch, row])
            ranks = random.choice(left, self.num_negatives, replace=False)
            # the item of a rank is the rank plus the own items below it
            drawn[index] = ranks + np.searchsorted(own - np.arange(len(own)), ranks, side="right")
        return drawn
