"""Packed sequences and evaluation rows: selecting, cutting, and the checks of their arrays."""

import numpy as np
import pytest

from laser_fast.data import EvaluationRows, PackedSequences
from laser_fast.data.sequences import cu_seqlens_of, segment_positions

LISTS = [[4, 2, 7], [], [1], [5, 5, 0, 3]]


def test_from_lists_packs_and_unpacks() -> None:
    packed = PackedSequences.from_lists(LISTS)
    assert packed.items.tolist() == [4, 2, 7, 1, 5, 5, 0, 3]
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4, 8]
    assert packed.items.dtype == np.int64
    assert packed.cu_seqlens.dtype == np.int32
    assert packed.lengths.tolist() == [3, 0, 1, 4]
    assert packed.to_lists() == LISTS
    assert packed[-1].tolist() == [5, 5, 0, 3]


def test_no_sequences_and_only_empty_ones() -> None:
    nothing = PackedSequences.from_lists([])
    assert len(nothing) == 0
    assert nothing.cu_seqlens.tolist() == [0]
    assert nothing.truncate_left(3).to_lists() == []
    assert nothing.select([]).to_lists() == []
    assert PackedSequences.from_lists([[], []]).truncate_left(0).to_lists() == [[], []]


def test_select_takes_rows_in_order_with_repeats_and_masks() -> None:
    packed = PackedSequences.from_lists(LISTS)
    assert packed.select([3, 1, 3]).to_lists() == [LISTS[3], [], LISTS[3]]
    assert packed.select(np.array([True, False, True, False])).to_lists() == [LISTS[0], LISTS[2]]


def test_select_copies() -> None:
    packed = PackedSequences.from_lists(LISTS)
    packed.select([0]).items[:] = 99
    assert packed.to_lists() == LISTS


@pytest.mark.parametrize("rows, got", [([4], "4"), ([0, -1], "-1")])
def test_select_refuses_rows_out_of_range(rows: list[int], got: str) -> None:
    with pytest.raises(ValueError, match=rf"PackedSequences.select: rows must lie in 0..3, got {got}"):
        PackedSequences.from_lists(LISTS).select(rows)


def test_select_refuses_fractions_and_short_masks() -> None:
    packed = PackedSequences.from_lists(LISTS)
    with pytest.raises(TypeError, match="rows must be a 1-D array of integers, got float64"):
        packed.select(np.array([0.5]))
    with pytest.raises(ValueError, match=r"one entry per row \(4\), got shape \(2,\)"):
        packed.select(np.array([True, False]))


@pytest.mark.parametrize("length, expected", [(0, [[], [], [], []]), (2, [[2, 7], [], [1], [0, 3]]), (4, LISTS)])
def test_truncate_left_keeps_the_newest(length: int, expected: list[list[int]]) -> None:
    assert PackedSequences.from_lists(LISTS).truncate_left(length).to_lists() == expected


def test_truncate_left_refuses_negative_lengths() -> None:
    with pytest.raises(ValueError, match="max_length must be at least 0, got -1"):
        PackedSequences.from_lists(LISTS).truncate_left(-1)


@pytest.mark.parametrize(
    "cu_seqlens",
    [[1, 2], [0, 1], [0, 2, 1, 2], [0, 3]],
    ids=["start", "end", "falls", "too long"],
)
def test_cu_seqlens_must_rise_from_zero_to_n(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 2"):
        PackedSequences(np.array([1, 2]), np.array(cu_seqlens, dtype=np.int32))


def test_dtypes_are_checked() -> None:
    with pytest.raises(TypeError, match="items must be int64 and cu_seqlens int32, got int64 and int64"):
        PackedSequences(np.array([1]), np.array([0, 1]))


def test_cu_seqlens_of_refuses_what_int32_cannot_hold() -> None:
    assert cu_seqlens_of(np.array([2**31 - 1])).tolist() == [0, 2**31 - 1]
    with pytest.raises(ValueError, match=f"must sum to at most {2**31 - 1}, got {2**31}"):
        cu_seqlens_of(np.array([2**31 - 1, 1]))


def test_segment_positions_concatenates_ranges() -> None:
    positions = segment_positions(np.array([5, 0, 9, 2]), np.array([2, 3, 0, 1]))
    assert positions.tolist() == [5, 6, 0, 1, 2, 2]
    assert segment_positions(np.array([]), np.array([])).tolist() == []


def test_evaluation_rows_select_keeps_the_three_parts_together() -> None:
    rows = EvaluationRows(np.array([7, 8, 9]), PackedSequences.from_lists([[1], [], [2, 3]]), np.array([4, 5, 6]))
    chosen = rows.select([2, 0])
    assert chosen.users.tolist() == [9, 7]
    assert chosen.histories.to_lists() == [[2, 3], [1]]
    assert chosen.targets.tolist() == [6, 4]
    assert len(rows.select([])) == 0


def test_evaluation_rows_must_have_one_length() -> None:
    with pytest.raises(ValueError, match=r"must have one length, got \(1,\), \(1,\) and \(2,\)"):
        EvaluationRows(np.array([0]), PackedSequences.from_lists([[1], [2]]), np.array([0]))
