"""Training rows for the data loaders of other libraries: torch's, accelerate's, those of transformers' Trainer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laser_fast.data.batches import BatchBuilder, PackedBatch
from laser_fast.data.negatives import NegativeSampler
from laser_fast.data.sequences import EvaluationRows, PackedSequences
from laser_fast.data.splits.split import TrainingRows


@dataclass(frozen=True, eq=False)
class NextItem:
    """One training row.

    Attributes:
        row: its number among all rows.
        user: index of the user.
        history: int64 [n], item indices, oldest first.
        target: index of the item that came next.
        fold: of the row, see `EvaluationRows`; -1 = none.
    """

    row: int
    user: int
    history: np.ndarray
    target: int
    fold: int = -1


class NextItemDataset:
    """Training rows as a map-style data set, for any sampler and any number of workers.

    Args:
        rows: of `training_rows`, which takes the folds of a cross-fitted recommender:
            `training_rows(split.train, 10, recommender.cross_fitted.of_users(split.train_users))`.
    """

    def __init__(self, rows: TrainingRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> NextItem:
        chosen = self.rows.select([row])
        fold = -1 if chosen.folds is None else int(chosen.folds[0])
        return NextItem(row, int(chosen.users[0]), chosen.histories.items, int(chosen.targets[0]), fold)


class NextItemCollator:
    """Rows to the arguments of `LaserModel.forward`: `model(**collate([dataset[3], dataset[8]])).loss`.

    Args:
        builder: the model's.
        with_positives: encode the targets with gradient, see `ObjectiveConfig.item_gradient`.
        negatives: draws items for every row; None = none. A row gets the same ones in every epoch.
    """

    def __init__(
        self, builder: BatchBuilder, *, with_positives: bool = True, negatives: NegativeSampler | None = None
    ) -> None:
        self.builder = builder
        self.with_positives = with_positives
        self.negatives = negatives

    def __call__(self, rows: Sequence[NextItem]) -> dict[str, PackedBatch]:
        users = np.array([row.user for row in rows], dtype=np.int64)
        targets = np.array([row.target for row in rows], dtype=np.int64)
        histories = PackedSequences.from_lists([row.history.tolist() for row in rows])
        folds = np.array([row.fold for row in rows], dtype=np.int64)
        chosen = EvaluationRows(users, histories, targets, folds if (folds >= 0).any() else None)
        drawn = None
        if self.negatives is not None:
            drawn = self.negatives.draw(users, 0, np.array([row.row for row in rows], dtype=np.int64))
        batch = self.builder.training_batch(chosen, with_positives=self.with_positives, negatives=drawn)
        return {"batch": batch}
