"""Leave-one-out on a hand table, its hash, and the training rows."""

from dataclasses import replace

import numpy as np
import pytest

from laser_fast.data import ItemTable, PackedSequences, SequenceDataset, leave_one_out, training_rows

# five users: long, exactly three events, two events, one, none
SEQUENCES = [[0, 1, 2, 3, 1], [4, 4, 2], [3, 0], [1], []]


@pytest.fixture
def dataset() -> SequenceDataset:
    return SequenceDataset.from_lists(SEQUENCES)


def test_leave_one_out_by_hand(dataset: SequenceDataset) -> None:
    split = leave_one_out(dataset)
    assert split.train.to_lists() == [[0, 1, 2], [4], [3, 0], [1], []]
    assert split.train_users.tolist() == [0, 1, 2, 3, 4]
    assert split.valid.users.tolist() == [0, 1]
    assert split.valid.histories.to_lists() == [[0, 1, 2], [4]]
    assert split.valid.targets.tolist() == [3, 4]
    assert split.test.users.tolist() == [0, 1]
    assert split.test.histories.to_lists() == [[0, 1, 2, 3], [4, 4]]
    assert split.test.targets.tolist() == [1, 2]
    assert split.rule == "leave-one-out, ties by file-order"


def test_every_event_is_used_once(dataset: SequenceDataset) -> None:
    split = leave_one_out(dataset)
    assert len(split.train.items) + len(split.valid) + len(split.test) == len(dataset.item_index)


def test_no_user_with_three_events() -> None:
    split = leave_one_out(SequenceDataset.from_lists([[0, 1], [1]]))
    assert len(split.valid) == len(split.test) == 0
    assert split.train.to_lists() == [[0, 1], [1]]


def test_hash_follows_items_sequences_users_and_rule_but_not_texts(dataset: SequenceDataset) -> None:
    ids = [str(index) for index in range(5)]
    base = leave_one_out(dataset).hash
    assert base == leave_one_out(SequenceDataset.from_lists(SEQUENCES, ItemTable(ids, {"title": ["x"] * 5}))).hash
    assert base != leave_one_out(SequenceDataset.from_lists(SEQUENCES, ItemTable(ids[::-1]))).hash
    assert base != leave_one_out(SequenceDataset.from_lists([[0, 1, 2, 1, 3], *SEQUENCES[1:]])).hash
    assert base != leave_one_out(SequenceDataset.from_lists(SEQUENCES, user_ids=list("abcde"))).hash
    other_rule = replace(dataset, manifest=replace(dataset.manifest, tie_rule="hash:1"))
    assert base != leave_one_out(other_rule).hash


def test_a_split_that_is_not_the_manifests_is_refused(dataset: SequenceDataset) -> None:
    split = leave_one_out(dataset)
    recorded = replace(dataset, manifest=replace(dataset.manifest, split_hash=split.hash))
    assert leave_one_out(recorded).hash == split.hash
    with pytest.raises(ValueError, match=f"must have the hash of the manifest, {split.hash}, got"):
        leave_one_out(replace(recorded, user_ids=list("abcde")))


def test_training_rows_are_all_positions_after_the_first() -> None:
    train = PackedSequences.from_lists([[5, 6, 7, 8], [], [1], [2, 2]])
    rows = training_rows(train, max_history=2)
    assert len(rows) == 4
    assert rows.users.tolist() == [0, 0, 0, 3]
    assert rows.targets.tolist() == [6, 7, 8, 2]
    assert rows.histories.to_lists() == [[5], [5, 6], [6, 7], [2]]


def test_training_rows_select_equals_the_whole(dataset: SequenceDataset) -> None:
    rows = training_rows(leave_one_out(dataset).train, max_history=50)
    whole, some = rows.select(np.arange(len(rows))), rows.select([2, 0])
    assert some.histories.to_lists() == [whole.histories.to_lists()[2], whole.histories.to_lists()[0]]
    assert some.targets.tolist() == whole.targets[[2, 0]].tolist()
    assert some.users.tolist() == whole.users[[2, 0]].tolist()


def test_training_rows_of_nothing() -> None:
    rows = training_rows(PackedSequences.from_lists([[], [3]]), max_history=5)
    assert len(rows) == 0
    assert len(rows.select([])) == 0


def test_training_rows_need_a_history() -> None:
    with pytest.raises(ValueError, match="max_history must be at least 1, got 0"):
        training_rows(PackedSequences.from_lists([[1, 2]]), max_history=0)
