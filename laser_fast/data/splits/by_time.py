"""Global-time split: one moment ends the training part for everybody, a later one the validation part."""

from datetime import datetime
from typing import Literal, get_args

import numpy as np

from laser_fast.data.dataset import SequenceDataset
from laser_fast.data.sequences import segment_positions
from laser_fast.data.splits.split import Split, check_fractions, cut_split, parts_hash
from laser_fast.data.time_units import TOLD, moment_in, units_in

Moment = float | int | str
TimeTargets = Literal["first", "last", "all"]


def global_time(
    dataset: SequenceDataset,
    *,
    valid_from: Moment | None = None,
    test_from: Moment | None = None,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    targets: TimeTargets = "first",
) -> Split:
    """Training events lie before `valid_from`, validation targets from there on, test targets from `test_from` on.

    So the newest training event is older than the oldest validation target, and that older than the oldest test
    target: nothing is learned from a future that a target's user could not know. Events of one moment go to the later
    part together. Users without an event before the border have rows with an empty history (`Split.counts`).

    Args:
        dataset: with timestamps of one unit for all users.
        valid_from, test_from: a number in the unit of the log, or an ISO date or time (UTC where it names no zone) for
            a log whose unit its times tell. Both or neither.
        valid_fraction, test_fraction: without moments: about this share of all events, the newest, goes to each part.
        targets: of a user's events in a part, the "first" is the target (its history ends where the part begins), the
            "last" (its history reaches into the part), or "all" are, one row each.

    Raises:
        ValueError: one moment without the other, a text that is no date, a date for a log whose unit cannot be told, a
            fraction or `targets` out of range, or a part without events.
    """
    if targets not in get_args(TimeTargets):
        raise ValueError(f"global_time: targets must be one of {get_args(TimeTargets)}, got {targets!r}")
    if (valid_from is None) != (test_from is None):
        raise ValueError(f"global_time: valid_from and test_from go together, got {valid_from!r} and {test_from!r}")
    if valid_from is None or test_from is None:
        borders = _borders(dataset.timestamps, valid_fraction, test_fraction)
    else:
        borders = _number(dataset, "valid_from", valid_from), _number(dataset, "test_from", test_from)
    before = [_events_before(dataset, border) for border in borders]
    everyone, lengths = np.arange(dataset.num_users, dtype=np.int64), np.diff(dataset.offsets)
    _check_parts(dataset, borders, [int(count.sum()) for count in (before[0], before[1] - before[0])])
    valid = _targets(before[0], before[1], targets)
    test = _targets(before[1], lengths, targets)
    rule = (
        f"global time, validation from {_words(borders[0])}, test from {_words(borders[1])}, {targets} "
        f"{'events' if targets == 'all' else 'event'} of each user, ties by {dataset.manifest.tie_rule}"
    )
    parts = (everyone, before[0]), valid, test
    split = cut_split(dataset, *parts, rule=rule, hash=parts_hash(dataset, rule, *parts))
    _assert_order(dataset, before[0], valid, test)
    return split


def _borders(times: np.ndarray, valid_fraction: float, test_fraction: float) -> tuple[float, float]:
    check_fractions("global_time", valid_fraction, test_fraction)
    if not len(times):
        raise ValueError("global_time: the data set must have events, got none")
    newest = [max(1, round(len(times) * share)) for share in (valid_fraction + test_fraction, test_fraction)]
    places = [max(0, len(times) - count) for count in newest]
    partitioned = np.partition(times, places)
    return partitioned[places[0]].item(), partitioned[places[1]].item()


def _number(dataset: SequenceDataset, name: str, moment: Moment) -> float:
    if not isinstance(moment, str):
        return moment
    try:
        when = datetime.fromisoformat(moment)
    except ValueError as error:
        raise ValueError(f"global_time: {name} must be a number or an ISO date, got {moment!r}") from error
    units = units_in(dataset.timestamps)
    if len(units) != 1:
        raise ValueError(
            f"global_time: {name} can be a date where all times are {TOLD}, got {moment!r} and a log with times in "
            f"{' and '.join(units) or 'no such unit'}; give a number in the unit of the log"
        )
    return moment_in(when, units[0])


def _words(border: float) -> str:
    return repr(int(border)) if float(border).is_integer() else repr(border)


def _events_before(dataset: SequenceDataset, border: float) -> np.ndarray:
    """How many events of each user are older: int64 [U]; they are its first ones, as times never fall."""
    running = np.zeros(len(dataset.timestamps) + 1, dtype=np.int64)
    np.cumsum(dataset.timestamps < border, out=running[1:])
    return np.asarray(running[dataset.offsets[1:]] - running[dataset.offsets[:-1]])


def _check_parts(dataset: SequenceDataset, borders: tuple[float, float], counts: list[int]) -> None:
    train, valid = counts
    test = len(dataset.timestamps) - train - valid
    if min(train, valid, test) < 1:
        span = [_words(value.item()) for value in (dataset.timestamps.min(), dataset.timestamps.max())]
        raise ValueError(
            f"global_time: every part must have events, got {train} to train on, {valid} of validation, {test} of test "
            f"with borders {_words(borders[0])} and {_words(borders[1])}; the log runs from {span[0]} to {span[1]}"
        )


def _targets(start: np.ndarray, end: np.ndarray, targets: TimeTargets) -> tuple[np.ndarray, np.ndarray]:
    """Users and events before the target of every row, from each user's events `start` to `end` - 1."""
    users = np.flatnonzero(end > start)
    if targets == "all":
        counts = (end - start)[users]
        return np.repeat(users, counts), segment_positions(start[users], counts)
    return users, start[users] if targets == "first" else end[users] - 1


def _assert_order(
    dataset: SequenceDataset,
    trained: np.ndarray,
    valid: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> None:
    """Newest training event < oldest validation target, newest validation target < oldest test target."""
    times, starts = dataset.timestamps, dataset.offsets[:-1]
    newest = times[(starts + trained - 1)[trained > 0]].max()
    of_valid, of_test = (times[starts[users] + before] for users, before in (valid, test))
    assert newest < of_valid.min() and of_valid.max() < of_test.min()
