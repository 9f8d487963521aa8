"""Splits by time and by user on hand tables, and the one a configuration names."""

from dataclasses import replace

import numpy as np
import pytest

from laser_fast.config import LaserConfig, SplitConfig, build_config
from laser_fast.data import SequenceDataset, Split, by_user, global_time, leave_one_out, make_split

# items count the events, so that a target names its event
TIMES = [[1, 2, 5, 5, 9], [3, 6, 8], [7, 8], [1, 1], []]


def timed(times: list[list[int]] = TIMES) -> SequenceDataset:
    counter = iter(range(100))
    dataset = SequenceDataset.from_lists([[next(counter) for _ in user] for user in times])
    return replace(dataset, timestamps=np.array([time for user in times for time in user], dtype=np.int64))


def test_global_time_by_hand() -> None:
    split = global_time(timed(), valid_from=5, test_from=8)
    assert split.train.to_lists() == [[0, 1], [5], [], [10, 11], []]
    # ties at a border (two events at 5, two at 8) go to the later part together
    assert split.valid.users.tolist() == [0, 1, 2]
    assert split.valid.targets.tolist() == [2, 6, 8]
    assert split.valid.histories.to_lists() == [[0, 1], [5], []]
    assert split.test.targets.tolist() == [4, 7, 9]
    assert split.test.histories.to_lists() == [[0, 1, 2, 3], [5, 6], [8]]
    assert split.rule == "global time, validation from 5, test from 8, first event of each user, ties by file-order"
    assert split.counts() == {
        "train_events": 5,
        "train_sequences": 3,
        "valid_rows": 3,
        "valid_rows_without_history": 1,
        "valid_rows_with_cold_target": 3,
        "test_rows": 3,
        "test_rows_without_history": 0,
        "test_rows_with_cold_target": 3,
    }


@pytest.mark.parametrize(
    ("targets", "valid", "histories"),
    [("last", [3, 6, 8], [[0, 1, 2], [5], []]), ("all", [2, 3, 6, 8], [[0, 1], [0, 1, 2], [5], []])],
)
def test_which_events_are_asked_about(targets: str, valid: list[int], histories: list[list[int]]) -> None:
    split = make_split(timed(), "global-time", valid_from=5, test_from=8, targets=targets)  # type: ignore[arg-type]
    assert split.valid.targets.tolist() == valid
    assert split.valid.histories.to_lists() == histories
    assert targets in split.rule


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("targets", ["first", "last", "all"])
def test_no_part_reaches_into_a_later_one(seed: int, targets: str) -> None:
    random = np.random.default_rng(seed)
    log = timed([sorted(random.integers(0, 30, size=count).tolist()) for count in random.integers(0, 9, size=12)])
    split = make_split(log, "global-time", valid_fraction=0.2, test_fraction=0.3, targets=targets)  # type: ignore[arg-type]
    train, valid, test = (
        log.timestamps[items] for items in (split.train.items, split.valid.targets, split.test.targets)
    )
    assert train.max() < valid.min() and valid.max() < test.min()
    for rows in (split.valid, split.test):  # the event before the target ends the history, whatever part it is of
        assert [row[-1] for row in rows.histories.to_lists() if row] == [
            target - 1 for target, row in zip(rows.targets.tolist(), rows.histories.to_lists(), strict=True) if row
        ]
    # the newest 30% are asked about, and what ties with the oldest of them
    assert targets == "last" or (log.timestamps >= test.min()).sum() >= round(0.3 * len(log.timestamps))


def test_dates_are_seconds_in_utc() -> None:
    first, day = 1_500_076_800, 86_400
    log = timed([[first + number * day for number in range(3)], [first + 3 * day]])
    split = global_time(log, valid_from="2017-07-16", test_from="2017-07-18T00:00:00+00:00")
    assert split.hash == global_time(log, valid_from=first + day, test_from=first + 3 * day).hash
    assert f"validation from {first + day}, test from {first + 3 * day}" in split.rule


def test_fractional_times_and_borders() -> None:
    log = replace(timed([[0, 1, 2]]), timestamps=np.array([0.25, 0.5, 0.75]))
    split = global_time(log, valid_from=0.5, test_from=0.75)
    assert split.train.to_lists() == [[0]] and "from 0.5, test from 0.75" in split.rule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid_from": 5}, "valid_from and test_from go together, got 5 and None"),
        ({"valid_from": "soon", "test_from": 8}, "valid_from must be a number or an ISO date, got 'soon'"),
        ({"valid_from": 8, "test_from": 5}, "got 7 to train on, -3 of validation, 7 of test|every part must have"),
        ({"valid_from": 0, "test_from": 5}, "got 0 to train on, .* the log runs from 1 to 9"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "sum to less than 1, got 0.5 and 0.5"),
        ({"test_fraction": 0.0}, "must be above 0 .* got 0.1 and 0.0"),
        ({"targets": "some"}, "targets must be one of .*, got 'some'"),
    ],
)
def test_borders_that_make_no_split_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"global_time: .*{message}"):
        global_time(timed(), **settings)  # type: ignore[arg-type]


def test_a_log_of_one_moment_has_no_split_by_time() -> None:
    with pytest.raises(ValueError, match="every part must have events, got 0 to train on"):
        global_time(timed([[4, 4], [4]]))
    with pytest.raises(ValueError, match="the data set must have events, got none"):
        global_time(timed([[], []]))


def _users(split: Split) -> list[set[int]]:
    return [set(split.train_users.tolist()), set(split.valid.users.tolist()), set(split.test.users.tolist())]


def test_by_user_keeps_users_apart() -> None:
    log = timed([[1, 2, 3]] * 20 + [[1]] * 3)
    split = by_user(log, valid_fraction=0.2, test_fraction=0.1, seed=3)
    train, valid, test = _users(split)
    assert (len(train), len(valid), len(test)) == (17, 4, 2)
    assert train | valid | test == set(range(23)) and not train & valid and not train & test and not valid & test
    assert {20, 21, 22} <= train  # one event is no history and target
    assert split.train.to_lists() == [log.sequence(user).tolist() for user in sorted(train)]
    for rows in (split.valid, split.test):
        assert [
            [*row, target] for row, target in zip(rows.histories.to_lists(), rows.targets.tolist(), strict=True)
        ] == [log.sequence(user).tolist() for user in rows.users.tolist()]
    assert split.rule == (
        "by user, 0.2 of them for validation and 0.1 for test with seed 3, their last event, ties by file-order"
    )


def test_by_user_follows_the_seed_and_the_ids_alone() -> None:
    log = timed([[1, 2, 3]] * 20)
    assert by_user(log).hash == by_user(log).hash
    assert _users(by_user(log, seed=1)) != _users(by_user(log, seed=2))
    backwards = replace(log, user_ids=log.user_ids[::-1])
    assert {19 - user for user in _users(by_user(backwards))[1]} == _users(by_user(log))[1]


def test_by_user_refuses_what_it_cannot_split() -> None:
    with pytest.raises(ValueError, match="by_user: at least 3 users must have 2 events, got 2"):
        by_user(timed([[1, 2], [1, 2], [1]]))
    with pytest.raises(ValueError, match="by_user: valid_fraction and test_fraction must .* got 0 and 0.1"):
        by_user(timed(), valid_fraction=0)


def test_every_split_has_a_hash_of_its_own() -> None:
    log = timed()
    hashes = [
        leave_one_out(log).hash,
        global_time(log, valid_from=5, test_from=8).hash,
        global_time(log, valid_from=5, test_from=8, targets="last").hash,
        by_user(log).hash,
        by_user(log, seed=1).hash,
    ]
    assert len(set(hashes)) == len(hashes)
    later = log.timestamps.copy()
    later[5] = 5  # the same sequences at other times are another split by time, and the same one otherwise
    moved = replace(log, timestamps=later)
    assert global_time(moved, valid_from=5, test_from=8).hash != hashes[1]
    assert leave_one_out(moved).hash == hashes[0]


def test_the_configuration_chooses_and_leave_one_out_is_what_it_was() -> None:
    log = timed()
    assert make_split(log, **SplitConfig().model_dump()).hash == leave_one_out(log).hash
    # the hash of checkpoints that exist: must never change
    assert leave_one_out(log).hash == "8c22e0828df6f436d81139ac00a7a3feebb8095fee886cd619ce1d568e59178d"
    chosen = build_config(SplitConfig, {"kind": "global-time", "valid_from": 5, "test_from": 8})
    assert make_split(log, **chosen.model_dump()).hash == global_time(log, valid_from=5, test_from=8).hash
    assert make_split(log, **SplitConfig(kind="by-user", seed=1).model_dump()).hash == by_user(log, seed=1).hash
    assert LaserConfig.model_fields["split"].default == SplitConfig()


def test_a_date_of_yaml_is_a_date() -> None:
    import yaml

    values = yaml.safe_load("{kind: global-time, valid_from: 2024-01-31, test_from: 2024-02-29 12:00:00}")
    config = build_config(SplitConfig, values)
    assert (config.valid_from, config.test_from) == ("2024-01-31", "2024-02-29T12:00:00")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("random", r"kind must be one of \('leave-one-out', .*, got 'random'"),
        ("given", "a data set that did not come split must be another than \"given\", got 'given'"),
    ],
)
def test_unknown_kinds_are_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"make_split: .*{message}"):
        make_split(timed(), kind)  # type: ignore[arg-type]
