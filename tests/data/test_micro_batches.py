"""Batches by token counts: what a selection of rows takes along, and parts that fit a limit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from laser_fast.data.batches import PackedBatch
from laser_fast.data.micro_batches import RowTokens, row_tokens
from laser_fast.data.sequences import cu_seqlens_of


def packed(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = cu_seqlens_of(np.array([len(row) for row in lists], dtype=np.int64))
    return torch.tensor([value for row in lists for value in row], dtype=torch.int64), torch.from_numpy(bounds)


def example() -> PackedBatch:
    """Four users of 3, 0, 2 and 5 text tokens; the first and the last share a positive of 4, the others of 1 and 2."""
    positives = PackedBatch(*packed([[7], [8], [9]]), *packed([[50], [51, 52], [53, 54, 55, 56]]))
    return PackedBatch(
        *packed([[1, 2], [], [3], [4, 5, 6]]),
        *packed([[10, 11, 12], [], [13, 14], [15, 16, 17, 18, 19]]),
        instruction=(2, 3),
        targets=torch.tensor([9, 7, 8, 9]),
        positives=positives,
        positive_targets=torch.tensor([2, 0, 1, 2]),
    )


def counts(users: list[int], positives: tuple[int, ...] = (), positive_of: tuple[int, ...] = ()) -> RowTokens:
    which = np.array(positive_of, dtype=np.int64).reshape(len(users), -1)
    return RowTokens(np.array(users), np.array(positives, dtype=np.int64), which)


def parts(tokens: RowTokens, limit: int) -> list[list[int]]:
    return [rows.tolist() for rows in tokens.split(limit)]


def test_selected_rows_bring_their_items_texts_and_positives() -> None:
    part = example().select([3, 1])
    assert len(part) == 2 and part.instruction == (2, 3)
    assert part.items.tolist() == [4, 5, 6] and part.cu_seqlens.tolist() == [0, 3, 3]
    assert part.input_ids.tolist() == [15, 16, 17, 18, 19] and part.token_cu_seqlens.tolist() == [0, 5, 5]
    assert part.targets is not None and part.targets.tolist() == [9, 7]
    assert part.positives is not None and part.positive_targets is not None
    assert part.positives.items.tolist() == [7, 9] and part.positives.input_ids.tolist() == [50, 53, 54, 55, 56]
    assert part.positive_targets.tolist() == [1, 0]
    assert part.items.dtype == part.input_ids.dtype == torch.int64 and part.cu_seqlens.dtype == torch.int32


def test_selected_rows_keep_their_folds() -> None:
    part = replace(example(), folds=torch.tensor([2, 0, -1, 1])).select([3, 1])
    assert part.folds is not None and part.folds.tolist() == [1, 0]
    assert part.positives is not None and part.positives.folds is None


def test_selected_rows_bring_their_negatives() -> None:
    whole = replace(
        example(),
        negatives=torch.tensor([[7, 8], [8, 9], [9, 7], [8, 7]]),
        negative_places=torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0]]),
    )
    assert whole.places.tolist() == [[2, 0, 1], [0, 1, 2], [1, 2, 0], [2, 1, 0]]
    assert whole.negatives is not None and whole.negative_places is not None
    first = replace(whole, negatives=whole.negatives[:, :1], negative_places=whole.negative_places[:, :1])
    part = first.select([3, 0])
    assert part.negatives is not None and part.negatives.tolist() == [[8], [7]]
    assert part.positives is not None and part.positives.items.tolist() == [7, 8, 9]
    assert part.places.tolist() == [[2, 1], [2, 0]]
    assert part.negative_places is not None and part.negative_places.tolist() == [[1], [0]]
    last = whole.select([1])
    assert last.places.tolist() == [[0, 1, 2]] and last.to("cpu").negatives is not None
    plain = replace(whole, positives=None, positive_targets=None, negative_places=None).select([2])
    assert plain.negatives is not None and plain.negatives.tolist() == [[9, 7]] and plain.negative_places is None


def test_a_batch_of_histories_alone_is_selected_as_such() -> None:
    batch = PackedBatch(*packed([[1], [2]]), *packed([[5, 6], [7]]))
    part = batch.select(np.array([False, True]))
    assert part.items.tolist() == [2] and part.input_ids.tolist() == [7]
    assert part.targets is None and part.positives is None and part.positive_targets is None
    with pytest.raises(ValueError, match=r"PackedBatch.select: rows must lie in 0..1, got 2"):
        batch.select([2])


def test_tokens_of_users_and_positives_are_counted_with_their_virtual_ones() -> None:
    tokens = row_tokens(example(), lambda batch: 10 if batch.targets is not None else 1)
    assert tokens.users.tolist() == [13, 10, 12, 15] and tokens.positives.tolist() == [2, 3, 5]
    assert tokens.rows.tolist() == [18, 12, 15, 20]
    assert tokens.total == 50 + 10
    assert row_tokens(PackedBatch(*packed([[1]]), *packed([[5, 6]])), lambda batch: 3).rows.tolist() == [5]


def test_parts_are_filled_longest_row_first_and_keep_the_order_of_rows() -> None:
    assert parts(counts([4, 6, 3, 3, 2]), 9) == [[0, 3, 4], [1, 2]]
    assert parts(counts([4, 6, 3, 3, 2]), 18) == [[0, 1, 2, 3, 4]]
    assert parts(counts([4, 6, 3, 3, 2]), 1) == [[0], [1], [2], [3], [4]]
    assert parts(counts([2, 9, 2]), 4) == [[0, 2], [1]]


def test_a_shared_positive_is_paid_for_once_in_a_part() -> None:
    shared = counts([2, 2, 2], (4, 4), (0, 1, 0))
    assert parts(shared, 8) == [[0, 2], [1]]
    assert parts(shared, 7) == [[0], [1], [2]]
    assert parts(shared, 14) == [[0, 1, 2]]


def test_a_negative_that_a_part_holds_already_is_not_paid_for_again() -> None:
    several = RowTokens(np.array([2, 2, 2]), np.array([4, 4, 1]), np.array([[0, 2], [1, 2], [2, 0]]))
    assert several.total == 15 and several.rows.tolist() == [7, 7, 7]
    assert parts(several, 9) == [[0, 2], [1]]
    assert parts(several, 8) == [[0], [1], [2]]
    assert parts(several, 15) == [[0, 1, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_no_part_is_above_the_limit_and_no_row_is_lost(seed: int) -> None:
    random = np.random.default_rng(seed)
    users, positives = random.integers(1, 60, 40), random.integers(1, 20, 12)
    tokens = RowTokens(users, positives, random.integers(0, 12, (40, 1)))
    limit = int(tokens.rows.max())
    found = tokens.split(limit)
    assert sorted(np.concatenate(found).tolist()) == list(range(40))
    for rows in found:
        spent = users[rows].sum() + positives[np.unique(tokens.positive_of[rows])].sum()
        assert spent <= limit and (np.diff(rows) > 0).all()
    assert len(found) <= 2 * int(np.ceil(tokens.rows.sum() / limit))  # first fit leaves at most one part half empty
    assert [rows.tolist() for rows in tokens.split(limit)] == [rows.tolist() for rows in found]
