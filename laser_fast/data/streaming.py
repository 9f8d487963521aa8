"""Training batches from a log that stays on disk: rows cut out of memory-mapped sequences, packed by a token budget.

What is held is one integer per user; the order of an epoch is computed (`Permutation`). A batch depends on nothing but
the seed, the epoch and the first of its rows, so a run goes on in the midst of an epoch, and every process knows the
batches of the others.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field

import numpy as np

from laser_fast.data.batches import BatchBuilder, PackedBatch
from laser_fast.data.dataset import SequenceDataset
from laser_fast.data.permutation import Permutation
from laser_fast.data.sequences import EvaluationRows, PackedSequences, cu_seqlens_of, row_indices, segment_positions

_LOOKAHEAD = 4096  # rows whose lengths are looked up at once


class StreamedRows:
    """The rows of `TrainingRows`, in the same order, without an array as long as the log.

    Args:
        dataset: its arrays are memory-mapped when it was loaded from a folder.
        train_lengths: int64 [U], events at the beginning of every user's sequence that are for training; for
            leave-one-out all but the last two.
        max_history: newest items of a history.

    Raises:
        ValueError: a user has fewer events than are to be trained on.
    """

    def __init__(self, dataset: SequenceDataset, train_lengths: np.ndarray, max_history: int) -> None:
        lengths = np.diff(dataset.offsets)
        if train_lengths.shape != lengths.shape or (train_lengths > lengths).any() or (train_lengths < 0).any():
            raise ValueError(
                "StreamedRows: train_lengths must be one for every user and at most its events, "
                f"got shape {train_lengths.shape}"
            )
        self.dataset = dataset
        self.max_history = max_history
        self._rows_before = np.zeros(len(lengths) + 1, dtype=np.int64)  # rows of the users before each one
        np.cumsum(np.maximum(train_lengths - 1, 0), out=self._rows_before[1:])

    def __len__(self) -> int:
        return int(self._rows_before[-1])

    def select(self, rows: np.ndarray) -> EvaluationRows:
        """The rows `rows`, with their histories and targets read from the sequences."""
        index = row_indices(rows, len(self), "StreamedRows.select")
        users = np.searchsorted(self._rows_before, index, side="right") - 1
        seen = index - self._rows_before[users] + 1  # events before the target
        first = self.dataset.offsets[users]
        kept = np.minimum(seen, self.max_history)
        items = self.dataset.item_index[segment_positions(first + seen - kept, kept)]
        targets = self.dataset.item_index[first + seen]
        histories = PackedSequences(items.astype(np.int64), cu_seqlens_of(kept))
        return EvaluationRows(users, histories, targets.astype(np.int64))


@dataclass
class LoaderPosition:
    """Where a loader stands: the epoch, and how many rows of it were given to all processes together."""

    epoch: int = 0
    row: int = 0


@dataclass(eq=False)
class TokenBudgetLoader:
    """Packed batches of at most so many tokens, in shuffled order; one epoch for every time it is iterated.

    With several processes each gets a batch of its own in every step, and all have the same number of steps; of the
    last rows of an epoch each gets an equal share, which may be a batch without rows.

        loader = TokenBudgetLoader(rows, model.builder, max_tokens=8192, virtual_tokens=33)
        for batch in loader:
            model(batch).loss.backward()

    Args:
        rows: what is drawn from.
        builder: the model's.
        max_tokens: of a batch, virtual ones included; a row that is longer on its own stands alone.
        virtual_tokens: beside the text of every sequence, see `LaserModel.virtual_tokens`.
        with_positives: the targets are encoded with the users, and count.
        seed: of the order.
        rank, world_size: of this process and of all.

    Attributes:
        position: where it stands after the batch that was given last; set it to go on from there.

    Raises:
        ValueError: a budget below 1, no rows, or a rank that is not one of the processes.
    """

    rows: StreamedRows
    builder: BatchBuilder
    max_tokens: int
    _: KW_ONLY
    virtual_tokens: int = 0
    with_positives: bool = True
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    position: LoaderPosition = field(default_factory=LoaderPosition, init=False)

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not len(self.rows):
            raise ValueError(
                f"TokenBudgetLoader: max_tokens and rows must be at least 1, got {self.max_tokens} and {len(self.rows)}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"TokenBudgetLoader: rank must lie in 0..{self.world_size - 1}, got {self.rank}")

    def __iter__(self) -> Iterator[PackedBatch]:
        """The batches that are left of the epoch; then `position` is at the start of the next."""
        for group, end in self._groups():
            rows = self.rows.select(group[self.rank])
            self.position = LoaderPosition(self.position.epoch, end)
            yield self.builder.training_batch(rows, with_positives=self.with_positives)
        self.position = LoaderPosition(self.position.epoch + 1)

    def _groups(self) -> Iterator[tuple[list[np.ndarray], int]]:
        """Rows of every process in every step, and how many rows of the epoch are given then."""
        order = Permutation(len(self.rows), [self.seed, self.position.epoch])
        start, total = self.position.row, len(self.rows)
        waiting = np.zeros(0, dtype=np.int64)
        lengths = np.zeros(0, dtype=np.int64)
        group: list[np.ndarray] = []
        ahead = start
        while start < total:
            while ahead < total and lengths.sum() <= self.max_tokens:
                more = order(np.arange(ahead, min(ahead + _LOOKAHEAD, total), dtype=np.int64))
                ahead += len(more)
                waiting, lengths = np.concatenate([waiting, more]), np.concatenate([lengths, self._tokens(more)])
            size = max(1, int(np.searchsorted(np.cumsum(lengths), self.max_tokens, side="right")))
            group.append(waiting[:size])
            waiting, lengths = waiting[size:], lengths[size:]
            start += size
            if len(group) == self.world_size:
                yield group, start
                group = []
        if group:
            yield np.array_split(np.concatenate(group), self.world_size), total

    def _tokens(self, rows: np.ndarray) -> np.ndarray:
        """Packed tokens of every row, its positive counted: int64 [B]."""
        chosen = self.rows.select(rows)
        lengths = self.builder.user_lengths(chosen.histories) + self.virtual_tokens
        if self.with_positives:
            lengths = lengths + self.builder.item_lengths(chosen.targets) + self.virtual_tokens
        return lengths
