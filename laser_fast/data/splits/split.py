"""What a split is, the leave-one-out split, and the training rows made from a training part."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laser_fast.data.dataset import SequenceDataset
from laser_fast.data.items import update_with_strings
from laser_fast.data.pieces import update_with_array
from laser_fast.data.sequences import EvaluationRows, PackedSequences, cu_seqlens_of, row_indices, segment_positions

MIN_EVENTS = 3  # one event to train on, one validation target, one test target


Part = tuple[np.ndarray, np.ndarray]  # users, and a number of events for each


@dataclass(frozen=True, eq=False)
class Split:
    """Training sequences and held-out rows of one data set.

    Args:
        train: the sequences to learn from, without the held-out events; some may be empty.
        train_users: int64, user index of each training sequence.
        valid: rows for choosing settings.
        test: rows for the figures that are reported; a history may hold validation items that are older.
        rule: the split and the tie rule in words, to be printed with every result.
        hash: SHA-256 over the item map, the users' sequences and the rule. Models trained on a split store it.
    """

    train: PackedSequences
    train_users: np.ndarray
    valid: EvaluationRows
    test: EvaluationRows
    rule: str
    hash: str

    def counts(self) -> dict[str, int]:
        """Events, sequences and rows of the parts; rows without a history, and rows whose target no training sequence
        holds."""
        trained = np.unique(self.train.items)
        counts = {"train_events": len(self.train.items), "train_sequences": int((self.train.lengths > 0).sum())}
        for part, rows in (("valid", self.valid), ("test", self.test)):
            counts[f"{part}_rows"] = len(rows)
            counts[f"{part}_rows_without_history"] = int((rows.histories.lengths == 0).sum())
            counts[f"{part}_rows_with_cold_target"] = int((~np.isin(rows.targets, trained)).sum())
        return counts


def check_fractions(function: str, valid_fraction: float, test_fraction: float) -> None:
    """Raise ValueError unless both parts get something and training too."""
    if min(valid_fraction, test_fraction) <= 0 or valid_fraction + test_fraction >= 1:
        raise ValueError(
            f"{function}: valid_fraction and test_fraction must be above 0 and sum to less than 1, "
            f"got {valid_fraction} and {test_fraction}"
        )


def leave_one_out_rule(tie_rule: str) -> str:
    """The split and the tie rule in words."""
    return f"leave-one-out, ties by {tie_rule}"


def split_hash(dataset: SequenceDataset, rule: str) -> str:
    """SHA-256 over the item map, the users, their sequences and the rule; texts and times are not part of it."""
    digest = hashlib.sha256()
    update_with_strings(digest, [rule])
    update_with_strings(digest, dataset.items.ids)
    update_with_strings(digest, dataset.user_ids)
    update_with_array(digest, dataset.offsets, "<i8")
    update_with_array(digest, dataset.item_index, "<i4")
    return digest.hexdigest()


def parts_hash(dataset: SequenceDataset, rule: str, train: Part, *rows: Part) -> str:
    """`split_hash`, and which events each part has: for splits that the sequences and the rule alone do not decide.

    Args:
        train: users of the training sequences and how many of their events belong to each.
        rows: users of the rows of a part and how many events are older than each target.
    """
    digest = hashlib.sha256(bytes.fromhex(split_hash(dataset, rule)))
    for users, lengths in (train, *rows):
        digest.update(len(users).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(users, dtype="<i8").data)
        digest.update(np.ascontiguousarray(lengths, dtype="<i8").data)
    return digest.hexdigest()


def _first_events(dataset: SequenceDataset, users: np.ndarray, lengths: np.ndarray) -> PackedSequences:
    """The `lengths` [B] oldest events of each of the users [B], repeats allowed."""
    positions = segment_positions(dataset.offsets[users], lengths)
    return PackedSequences(dataset.item_index[positions].astype(np.int64), cu_seqlens_of(lengths))


def _event_rows(dataset: SequenceDataset, users: np.ndarray, events_before: np.ndarray) -> EvaluationRows:
    """Rows whose target is the event of user `users[b]` with `events_before[b]` older ones, all of them its history."""
    targets = dataset.item_index[dataset.offsets[users] + events_before].astype(np.int64)
    return EvaluationRows(users, _first_events(dataset, users, events_before), targets)


def cut_split(dataset: SequenceDataset, train: Part, valid: Part, test: Part, *, rule: str, hash: str) -> Split:
    """The split of users with how many events each learns from, and of users with the events before each target."""
    return Split(
        train=_first_events(dataset, *train),
        train_users=train[0],
        valid=_event_rows(dataset, *valid),
        test=_event_rows(dataset, *test),
        rule=rule,
        hash=hash,
    )


def leave_one_out(dataset: SequenceDataset) -> Split:
    """Last event of every user = test target, second last = validation target, the rest = training part.

    Users with fewer than 3 events only train. The users' clocks are not aligned: training events of one user may
    lie after the test event of another, as usual with this protocol.

    Raises:
        ValueError: the data set has too many events for int32 offsets, or is not the one its manifest describes.
    """
    lengths = np.diff(dataset.offsets)
    everyone = np.arange(dataset.num_users, dtype=np.int64)
    held_out = everyone[lengths >= MIN_EVENTS]
    train_lengths = np.where(lengths >= MIN_EVENTS, lengths - 2, lengths)
    rule = leave_one_out_rule(dataset.manifest.tie_rule)
    actual = split_hash(dataset, rule)
    if dataset.manifest.split_hash not in ("", actual):
        raise ValueError(
            f"leave_one_out: the split must have the hash of the manifest, {dataset.manifest.split_hash}, "
            f"got {actual}; prepare the data set again"
        )
    valid, test = (held_out, lengths[held_out] - 2), (held_out, lengths[held_out] - 1)
    return cut_split(dataset, (everyone, train_lengths), valid, test, rule=rule, hash=actual)


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Every position after the first of every training sequence as (history, target).

    Only two integers per row are held: histories are cut out of the packed sequences by `select`, so memory grows
    with the events and not with events times history length.

    Args:
        train: the sequences the rows are cut from.
        users: [R], int64, sequence of each row.
        positions: [R], int64, position of each row's target in `train.items`.
        max_history: histories keep this many newest items.
        folds: [sequences of `train`], int64, see `EvaluationRows`; None = no row has one.
    """

    train: PackedSequences
    users: np.ndarray
    positions: np.ndarray
    max_history: int
    folds: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def targets(self) -> np.ndarray:
        """Target of every row, int64 [R]."""
        return np.asarray(self.train.items[self.positions])

    @property
    def histories(self) -> PackedSequences:
        """All histories at once: events x history length items; prefer `select` on batches."""
        return self.select(np.arange(len(self))).histories

    def select(self, rows: np.ndarray | Sequence[int]) -> EvaluationRows:
        """The rows `rows` (indices, repeats allowed, or a boolean mask) with their histories cut out."""
        index = row_indices(rows, len(self), "TrainingRows.select")
        users, positions = self.users[index], self.positions[index]
        lengths = np.minimum(positions - self.train.cu_seqlens[users], self.max_history)
        histories = self.train.items[segment_positions(positions - lengths, lengths)]
        folds = None if self.folds is None else self.folds[users]
        packed = PackedSequences(histories, cu_seqlens_of(lengths))
        return EvaluationRows(users, packed, self.train.items[positions], folds)


def training_rows(train: PackedSequences, max_history: int, folds: np.ndarray | None = None) -> TrainingRows:
    """Rows in the order of the sequences, then of time; `rows.users` counts sequences of `train`.

    Args:
        folds: int64, fold of every sequence of `train`, see `EvaluationRows`; None = no row has one.

    Raises:
        ValueError: `max_history` is smaller than 1, or the folds are not one for each sequence.
    """
    if max_history < 1:
        raise ValueError(f"training_rows: max_history must be at least 1, got {max_history}")
    if folds is not None and folds.shape != (len(train),):
        raise ValueError(f"training_rows: folds must be one for each of {len(train)} sequences, got {folds.shape}")
    lengths = train.lengths
    has_target = np.ones(len(train.items), dtype=bool)
    has_target[train.cu_seqlens[:-1][lengths > 0]] = False
    users = np.repeat(np.arange(len(train), dtype=np.int64), lengths)
    return TrainingRows(train, users[has_target], np.flatnonzero(has_target).astype(np.int64), max_history, folds)
