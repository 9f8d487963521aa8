"""Split by user: whoever is asked about in validation or test has no event in the training part."""

import hashlib

import numpy as np

from laser_fast.data.dataset import SequenceDataset
from laser_fast.data.splits.split import Split, check_fractions, cut_split, parts_hash

_MIN_EVENTS = 2  # a history and a target


def by_user(
    dataset: SequenceDataset, *, valid_fraction: float = 0.1, test_fraction: float = 0.1, seed: int = 0
) -> Split:
    """Some users are for validation, others for test, the rest for training; the last event of a held-out user is its
    target, all earlier ones its history.

    Who is held out follows from a hash of the seed and the user's id, so it does not depend on the order of the log.
    Users with one event only train.

    Args:
        valid_fraction, test_fraction: share of the users with two or more events, rounded down, at least one user.
        seed: of the choice.

    Raises:
        ValueError: a fraction is out of range, or too few users have two events.
    """
    check_fractions("by_user", valid_fraction, test_fraction)
    lengths = np.diff(dataset.offsets)
    able = np.flatnonzero(lengths >= _MIN_EVENTS)
    counts = [max(1, int(len(able) * fraction)) for fraction in (valid_fraction, test_fraction)]
    if len(able) <= sum(counts):
        raise ValueError(f"by_user: at least 3 users must have {_MIN_EVENTS} events, got {len(able)}")
    keys = [hashlib.sha256(f"{seed}:{dataset.user_ids[user]}".encode()).digest() for user in able.tolist()]
    shuffled = able[np.array(sorted(range(len(able)), key=keys.__getitem__), dtype=np.int64)]
    valid, test = np.sort(shuffled[: counts[0]]), np.sort(shuffled[counts[0] : sum(counts)])
    train = np.setdiff1d(np.arange(dataset.num_users, dtype=np.int64), np.concatenate([valid, test]))
    rule = (
        f"by user, {valid_fraction:g} of them for validation and {test_fraction:g} for test with seed {seed}, their "
        f"last event, ties by {dataset.manifest.tie_rule}"
    )
    parts = [(users, lengths[users] - 1) for users in (valid, test)]
    learned = train, lengths[train]
    return cut_split(dataset, learned, *parts, rule=rule, hash=parts_hash(dataset, rule, learned, *parts))
