"""The split that a configuration names."""

from typing import Literal, get_args

from laser_fast.data.dataset import SequenceDataset
from laser_fast.data.preparation.presplit import given_split, is_presplit
from laser_fast.data.splits.by_time import Moment, TimeTargets, global_time
from laser_fast.data.splits.by_user import by_user
from laser_fast.data.splits.split import Split, leave_one_out

SplitKind = Literal["leave-one-out", "global-time", "by-user", "given"]


def make_split(
    dataset: SequenceDataset,
    kind: SplitKind = "leave-one-out",
    *,
    valid_from: Moment | None = None,
    test_from: Moment | None = None,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    targets: TimeTargets = "first",
    seed: int = 0,
) -> Split:
    """`leave_one_out`, `global_time`, `by_user` or `given_split`, with the settings that concern it.

    Raises:
        ValueError: an unknown kind; "given" and a data set that did not come split, or the other way round; see the
            functions.
    """
    if kind not in get_args(SplitKind):
        raise ValueError(f"make_split: kind must be one of {get_args(SplitKind)}, got {kind!r}")
    if is_presplit(dataset) != (kind == "given"):
        state = "came split" if is_presplit(dataset) else "did not come split"
        other = '"given"' if is_presplit(dataset) else 'another than "given"'
        raise ValueError(f"make_split: the split of a data set that {state} must be {other}, got {kind!r}")
    if kind == "global-time":
        return global_time(
            dataset,
            valid_from=valid_from,
            test_from=test_from,
            valid_fraction=valid_fraction,
            test_fraction=test_fraction,
            targets=targets,
        )
    if kind == "by-user":
        return by_user(dataset, valid_fraction=valid_fraction, test_fraction=test_fraction, seed=seed)
    return given_split(dataset) if kind == "given" else leave_one_out(dataset)
