"""Training rows for the data loaders of other libraries: torch's, accelerate's, those of transformers' Trainer."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from laser_fast.data.batches import BatchBuilder, PackedBatch
from laser_fast.data.negatives import NegativeSampler
from laser_fast.data.sequences import EvaluationRows, PackedSequences
from laser_fast.data.splits.split import TrainingRows


@dataclass(frozen=True, eq=False)
class NextItem:
    """One training row: its number, the user's index, item indices (int64 [n], oldest first), the one that came next,
    and its fold (see `EvaluationRows`; -1 = none)."""

    row: int
    user: int
    history: np.ndarray
    target: int
    fold: int = -1


@dataclass(frozen=True, eq=False)
class NextItemDataset:
    """Training rows as a map-style data set, for any sampler and any number of workers.

    Args:
        rows: of `training_rows`, which takes the folds of a cross-fitted recommender:
            `training_rows(split.train, 10, recommender.cross_fitted.of_users(split.train_users))`.
    """

    rows: TrainingRows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> NextItem:
        chosen = self.rows.select([row])
        fold = -1 if chosen.folds is None else int(chosen.folds[0])
        return NextItem(row, int(chosen.users[0]), chosen.histories.items, int(chosen.targets[0]), fold)


@dataclass(frozen=True, eq=False)
class NextItemCollator:
    """Rows to the arguments of `LaserModel.forward`: `model(**collate([dataset[3], dataset[8]])).loss`.

    Args:
        builder: the model's.
        with_positives: encode the targets with gradient, see `ObjectiveConfig.item_gradient`.
        negatives: draws items for every row; None = none. A row gets the same ones in every epoch.
    """

    builder: BatchBuilder
    _: KW_ONLY
    with_positives: bool = True
    negatives: NegativeSampler | None = None

    def __call__(self, rows: Sequence[NextItem]) -> dict[str, PackedBatch]:
        numbers = np.array([(row.row, row.user, row.target, row.fold) for row in rows], dtype=np.int64).reshape(-1, 4)
        number, users, targets, folds = np.ascontiguousarray(numbers.T)
        histories = PackedSequences.from_lists([row.history for row in rows])
        chosen = EvaluationRows(users, histories, targets, folds if (folds >= 0).any() else None)
        drawn = None if self.negatives is None else self.negatives.draw(users, 0, number)
        return {"batch": self.builder.training_batch(chosen, with_positives=self.with_positives, negatives=drawn)}
