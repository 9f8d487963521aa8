"""Batches from sequences on disk: the rows of the split, each once an epoch, in shuffled order and bounded memory."""

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_fast.data import (
    PackedSequences,
    PromptLayout,
    SequenceDataset,
    TokenizedTexts,
    leave_one_out,
    training_rows,
    write_dataset,
)
from laser_fast.data.batches import BatchBuilder, PackedBatch
from laser_fast.data.permutation import Permutation
from laser_fast.data.streaming import LoaderPosition, StreamedRows, TokenBudgetLoader

NUM_ITEMS = 40


def texts(num_items: int = NUM_ITEMS) -> TokenizedTexts:
    lengths = 1 + np.arange(num_items) % 7
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenizedTexts(np.arange(offsets[-1], dtype=np.int32), offsets)


def builder(num_items: int = NUM_ITEMS, *, prompt_first: bool = False) -> BatchBuilder:
    user = PromptLayout([900, 901], [902], [903], max_items=4, max_tokens=15)
    item = PromptLayout([904], [], [], max_tokens=6)
    known = np.ones(num_items, dtype=bool)
    return BatchBuilder(texts(num_items), user, item, known, max_history=3, prompt_first=prompt_first)


@pytest.fixture
def dataset(tmp_path: Path) -> SequenceDataset:
    random = np.random.default_rng(0)
    lengths = [0, 1, 2, 3, 4, 30, 3, 2, *random.integers(3, 12, 20)]
    return write_dataset(
        tmp_path / "set",
        SequenceDataset.from_lists([random.integers(0, NUM_ITEMS, n).tolist() for n in lengths] + [[NUM_ITEMS - 1]]),
    )


def rows_of(dataset: SequenceDataset, max_history: int = 5) -> StreamedRows:
    lengths = np.diff(dataset.offsets)
    return StreamedRows(dataset, np.where(lengths >= 3, lengths - 2, lengths), max_history)


def test_rows_are_those_of_the_split(dataset: SequenceDataset) -> None:
    expected = training_rows(leave_one_out(dataset).train, 5)
    rows = rows_of(dataset)
    assert len(rows) == len(expected) > 100
    order = np.random.default_rng(1).permutation(len(rows))
    ours, theirs = rows.select(order), expected.select(order)
    assert ours.histories.to_lists() == theirs.histories.to_lists()
    assert ours.targets.tolist() == theirs.targets.tolist()
    assert ours.users.tolist() == theirs.users.tolist()
    assert rows.select(np.zeros(0, dtype=np.int64)).targets.shape == (0,)
    with pytest.raises(ValueError, match=rf"rows must lie in 0\.\.{len(rows) - 1}, got {len(rows)}"):
        rows.select(np.array([len(rows)]))
    with pytest.raises(ValueError, match="train_lengths must be one for every user and at most its events"):
        StreamedRows(dataset, np.diff(dataset.offsets) + 1, 5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_a_permutation_gives_every_row_once(size: int) -> None:
    everything = np.arange(size)
    shuffled = Permutation(size, 3)(everything)
    assert sorted(shuffled) == everything.tolist()
    part = np.random.default_rng(0).permutation(size)[: size // 2]
    assert (Permutation(size, 3)(part) == shuffled[part]).all()  # nothing of it depends on what else is asked
    if size > 60:
        assert (shuffled != Permutation(size, 4)(everything)).mean() > 0.9
        assert (shuffled != Permutation(size, [3, 1])(everything)).mean() > 0.9


def test_a_permutation_shuffles_well() -> None:
    size, draws = 20, 300
    counts = np.zeros((size, size))
    follows = 0
    for seed in range(draws):
        shuffled = Permutation(size, [seed, 1])(np.arange(size))
        counts[np.arange(size), shuffled] += 1
        follows += int((np.diff(shuffled) == 1).sum())
    expected = draws / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)
    assert abs(follows / draws - (size - 1) / size) < 5 / np.sqrt(draws)  # neighbours stay neighbours as by chance
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Permutation(0, 0)
    with pytest.raises(ValueError, match=r"positions must lie in 0\.\.4, got 5"):
        Permutation(5, 0)(np.array([5]))


def key(batch: PackedBatch) -> list[tuple[tuple[int, ...], int]]:
    """Text and target of every row."""
    assert batch.targets is not None
    bounds = batch.token_cu_seqlens.tolist()
    prompts = [tuple(batch.input_ids[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    return list(zip(prompts, batch.targets.tolist(), strict=True))


def tokens(batch: PackedBatch, virtual: int) -> int:
    own = len(batch.input_ids) + virtual * len(batch)
    return own if batch.positives is None else own + len(batch.positives.input_ids) + virtual * len(batch.positives)


@pytest.mark.parametrize("prompt_first", [False, True], ids=["prefix-first", "prompt-first"])
@pytest.mark.parametrize("with_positives", [False, True])
def test_an_epoch_has_every_row_once_within_the_budget(
    dataset: SequenceDataset, with_positives: bool, prompt_first: bool
) -> None:
    rows, build = rows_of(dataset), builder(prompt_first=prompt_first)
    options: dict[str, Any] = {"virtual_tokens": 2, "with_positives": with_positives, "seed": 5}
    loader = TokenBudgetLoader(rows, build, 120, **options)
    epochs = [list(loader), list(loader)]
    everything = sorted(key(build.training_batch(rows.select(np.arange(len(rows))), with_positives=False)))
    for batches in epochs:
        assert all(tokens(batch, 2) <= 120 for batch in batches)
        assert sorted(row for batch in batches for row in key(batch)) == everything
        # full: the next batch's first row would not have fitted, counted with its positive
        assert np.mean([tokens(batch, 2) for batch in batches[:-1]]) > (80 if not with_positives else 60)
    assert [key(batch) for batch in epochs[0]] != [key(batch) for batch in epochs[1]]
    assert loader.position == LoaderPosition(2, 0)
    again = TokenBudgetLoader(rows, build, 120, **options)
    assert [key(batch) for batch in again] == [key(batch) for batch in epochs[0]]


def test_a_row_beyond_the_budget_stands_alone(dataset: SequenceDataset) -> None:
    batches = list(TokenBudgetLoader(rows_of(dataset), builder(), 1))
    assert all(len(batch) == 1 for batch in batches) and len(batches) == len(rows_of(dataset))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_goes_on_where_it_stopped(dataset: SequenceDataset, world_size: int) -> None:
    def loaders() -> list[TokenBudgetLoader]:
        rows = rows_of(dataset)
        return [
            TokenBudgetLoader(rows, builder(), 90, seed=1, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]

    whole = [[key(batch) for batch in loader] for loader in loaders()]
    assert len({len(steps) for steps in whole}) == 1  # all processes take the same number of steps
    spread = sorted(row for steps in whole for step in steps for row in step)
    (alone,) = [TokenBudgetLoader(rows_of(dataset), builder(), 90, seed=1)]
    assert spread == sorted(row for batch in alone for row in key(batch))
    for stop in (1, 3, len(whole[0]) - 1):
        for rank, (first, second) in enumerate(zip(loaders(), loaders(), strict=True)):
            batches = iter(first)
            begun = [key(next(batches)) for _ in range(stop)]
            second.position = first.position
            assert begun + [key(batch) for batch in second] == whole[rank]


def test_bad_settings_are_refused(dataset: SequenceDataset) -> None:
    rows = rows_of(dataset)
    with pytest.raises(ValueError, match=r"max_tokens and rows must be at least 1, got 0 and \d+"):
        TokenBudgetLoader(rows, builder(), 0)
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1, got 2"):
        TokenBudgetLoader(rows, builder(), 10, rank=2, world_size=2)
    empty = StreamedRows(dataset, np.zeros(dataset.num_users, dtype=np.int64), 5)
    with pytest.raises(ValueError, match=r"must be at least 1, got 10 and 0"):
        TokenBudgetLoader(empty, builder(), 10)


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    peaks = []
    for num_users in (1_000, 4_000):
        random = np.random.default_rng(0)
        items = random.integers(0, NUM_ITEMS, (num_users, 60))
        items[0, 0] = NUM_ITEMS - 1
        made = PackedSequences(items.ravel().astype(np.int64), np.arange(0, items.size + 1, 60, dtype=np.int32))
        write_dataset(tmp_path / str(num_users), SequenceDataset.from_lists([made[row] for row in range(num_users)]))
        loaded = SequenceDataset.load(tmp_path / str(num_users), verify=False)
        tracemalloc.start()
        rows = StreamedRows(loaded, np.diff(loaded.offsets) - 2, 10)
        batches = iter(TokenBudgetLoader(rows, builder(), 2_000))
        for _ in range(20):
            next(batches)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert isinstance(loaded.item_index.base, np.memmap) or isinstance(loaded.item_index, np.memmap)
    log_bytes = 4_000 * 60 * 4
    assert peaks[1] - peaks[0] < log_bytes / 4  # 3,000 users more: their offsets, not their events
