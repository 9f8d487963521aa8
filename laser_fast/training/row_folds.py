"""The rows Laser is trained on, and for each the fold of the recommender that has not seen its user."""

import warnings

import numpy as np

from laser_fast.config import LaserConfig
from laser_fast.data import TrainingRows, training_rows
from laser_fast.evaluation.state_gap import measure_state_gap
from laser_fast.laser.build import Inputs
from laser_fast.recommenders.packed_recommender import PackedRecommender


def laser_rows(config: LaserConfig, inputs: Inputs, *, warn: bool = True) -> TrainingRows:
    """Every position after the first of every training sequence, with its fold where the states of folds are read.

    Args:
        warn: say so, with the measured gap, when the prefix is to be learned from states of a recommender that has seen
            the targets.

    Raises:
        ValueError: `mformer.states` is "cross-fitted" and the recommender has no folds.
    """
    max_history = max(config.prompt.max_items, config.mformer.max_history, config.text.max_history)
    folds = _row_folds(config, inputs, warn) if config.bituning.reads_states else None
    return training_rows(inputs.split.train, max_history, folds)


def _row_folds(config: LaserConfig, inputs: Inputs, warn: bool) -> np.ndarray | None:
    """Fold of every training sequence: int64; None where all states are the full model's."""
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
        _warn(inputs, has_folds=folds is not None)
    return None


def _warn(inputs: Inputs, *, has_folds: bool) -> None:
    figures = ""
    if isinstance(recommender := inputs.recommender, PackedRecommender):
        figures = f" ({recommender.gap or measure_state_gap(recommender, inputs.split)})"
    cure = 'set mformer.states to "auto"' if has_folds else "train it with `laser-fast recommender train ... --folds 3`"
    warnings.warn(
        "train_laser: the prefix should be written from states of a recommender that has not seen the targets of the "
        f"rows, got one that has{figures}; {cure}",
        stacklevel=4,
    )
