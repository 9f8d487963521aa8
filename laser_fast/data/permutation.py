"""A shuffle that is computed instead of held: a keyed bijection on 0..n-1 in constant memory.

A Feistel network (Luby and Rackoff 1988) permutes 0..4^h-1, the next power of four; what falls beyond n-1 goes through
it again until it falls inside (cycle walking, Black and Rogaway 2002), less than four times on average.
"""

import numpy as np

from laser_fast.data.sequences import check_range

_ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Step of SplitMix64 from one value to the next."""


def split_mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


class Permutation:
    """Shuffled row numbers: `Permutation(n, [seed, epoch])(positions)` are the rows that stand at these positions.

    Args:
        size: n, at least 1.
        seed: an integer or several, not negative.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, size: int, seed: int | list[int]) -> None:
        if size < 1:
            raise ValueError(f"Permutation: size must be at least 1, got {size}")
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [m] positions in 0..n-1 -> int64 [m] rows; different positions give different rows.

        Raises:
            ValueError: a position out of range.
        """
        check_range(positions, self.size, "Permutation: positions")
        rows = self._once(positions.astype(np.uint64))
        while (outside := rows >= self.size).any():
            rows[outside] = self._once(rows[outside])
        return rows.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (split_mix(right + key + GOLDEN) & self._mask)
        return (left << self._half_bits) | right
