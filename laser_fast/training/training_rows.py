"""The rows Laser is trained on, and which of them an epoch takes."""

import math
import warnings
from collections.abc import Iterator

import numpy as np

from laser_fast.config import LaserConfig
from laser_fast.data import TrainingRows, training_rows
from laser_fast.evaluation.state_gap import measure_state_gap
from laser_fast.laser.build import Inputs
from laser_fast.recommenders.packed_recommender import PackedRecommender


def laser_rows(config: LaserConfig, inputs: Inputs, *, warn: bool = True) -> TrainingRows:
    """Every position after the first of every training sequence.

    Where the states of folds are read, a row has the fold of the recommender that has not seen its user.

    Args:
        warn: warn, with the measured gap, if the prefix would be learned from a recommender that has seen the targets.
    """
    max_history = max(config.prompt.max_items, config.mformer.max_history, config.text.max_history)
    folds = _folds(config, inputs, warn) if config.bituning.reads_states else None
    return training_rows(inputs.split.train, max_history, folds)


def _folds(config: LaserConfig, inputs: Inputs, warn: bool) -> np.ndarray | None:
    """Fold of every training sequence, int64; None if all states are the full model's."""
    recommender, states = inputs.recommender, config.mformer.states
    folds = getattr(recommender, "cross_fitted", None)
    if states != "in-sample" and folds is not None:
        found: np.ndarray = folds.of_users(inputs.split.train_users)
        return found
    if states == "cross-fitted":
        raise ValueError(
            f"train_laser: the recommender must have folds when mformer.states is {states!r}, got a "
            f"{type(recommender).__name__} without; make it by `laser-fast recommender train ... --folds 3`"
        )
    if warn:
        figures = ""
        if isinstance(recommender, PackedRecommender):
            figures = f" ({recommender.gap or measure_state_gap(recommender, inputs.split)})"
        cure = "train it with `laser-fast recommender train ... --folds 3`"
        if folds is not None:
            cure = 'set mformer.states to "auto"'
        warnings.warn(
            "train_laser: the prefix should be written from states of a recommender that has not seen the targets of "
            f"the rows, got one that has{figures}; {cure}",
            stacklevel=3,
        )
    return None


class RowSampler:
    """Draws the rows of each epoch and repeats none before all were drawn; `rows_per_epoch` None = all."""

    def __init__(self, num_rows: int, rows_per_epoch: int | None, seed: int) -> None:
        self.num_rows = num_rows
        self.rows_per_epoch = num_rows if rows_per_epoch is None else rows_per_epoch
        self.seed = seed

    def epoch(self, index: int) -> np.ndarray:
        """Row numbers of epoch `index`: int64 [rows_per_epoch]."""
        wanted = np.arange(index * self.rows_per_epoch, (index + 1) * self.rows_per_epoch)
        rows = np.empty(self.rows_per_epoch, dtype=np.int64)
        for shuffle in np.unique(wanted // self.num_rows):
            order = np.random.default_rng([self.seed, int(shuffle)]).permutation(self.num_rows)
            here = wanted // self.num_rows == shuffle
            rows[here] = order[wanted[here] % self.num_rows]
        return rows

    def batches(self, epoch: int, batch_size: int) -> Iterator[np.ndarray]:
        """The rows of an epoch, `batch_size` at a time; the last batch may be smaller."""
        rows = self.epoch(epoch)
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]

    def num_batches(self, batch_size: int) -> int:
        """Number of batches of one epoch."""
        return math.ceil(self.rows_per_epoch / batch_size)
