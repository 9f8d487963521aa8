"""Drawn negatives: uniform over the items outside a user's sequence, and the same for a row wherever it is drawn."""

import numpy as np
import pytest

from laser_fast.data.negatives import NegativeSampler
from laser_fast.data.sequences import PackedSequences

TRAIN = PackedSequences.from_lists([[0, 5, 5, 9], [1], [2, 3, 4, 6, 7, 8]])


def test_items_outside_the_sequence_are_drawn_uniformly_and_none_twice() -> None:
    sampler = NegativeSampler(TRAIN, 10, 3, seed=4)
    rows = np.arange(3000)
    drawn = sampler.draw(np.zeros(3000, dtype=np.int64), 0, rows)
    assert drawn.shape == (3000, 3) and drawn.dtype == np.int64
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=10)
    assert counts[[0, 5, 9]].tolist() == [0, 0, 0]
    # 9,000 draws over 7 items: 1,286 each, standard deviation of a count about 27
    assert (np.abs(counts[[1, 2, 3, 4, 6, 7, 8]] - 9000 / 7) < 5 * 27).all()


def test_a_row_has_its_negatives_whatever_the_batch() -> None:
    sampler = NegativeSampler(TRAIN, 10, 2, seed=4)
    users, rows = np.array([0, 1, 2, 1]), np.array([7, 11, 12, 3])
    together = sampler.draw(users, 2, rows)
    apart = [sampler.draw(users[[i]], 2, rows[[i]])[0].tolist() for i in (3, 2, 1, 0)]
    assert together.tolist() == apart[::-1]
    many = np.arange(50)
    one_user = np.ones(50, dtype=np.int64)
    draws = [sampler.draw(one_user, 2, many), sampler.draw(one_user, 3, many)]
    draws.append(NegativeSampler(TRAIN, 10, 2, seed=5).draw(one_user, 2, many))
    assert not any((one == other).all() for one, other in [draws[:2], draws[1:], draws[::2]])
    assert len({tuple(row) for row in draws[0].tolist()}) > 10


def test_all_items_left_can_be_drawn_and_no_more() -> None:
    drawn = NegativeSampler(TRAIN, 10, 4, seed=0).draw(np.array([2]), 0, np.array([0]))
    assert sorted(drawn[0].tolist()) == [0, 1, 5, 9]
    with pytest.raises(ValueError, match=r"num_negatives must be at most 4, the items .* of user 2, got 5"):
        NegativeSampler(TRAIN, 10, 5, seed=0).draw(np.array([2]), 0, np.array([0]))
