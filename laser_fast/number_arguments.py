"""Numbers of the command line, with the bounds that settings have in `config`."""

import argparse
import math
from collections.abc import Callable

MOST = 10**6
"""Of what a command loops over or holds at once: items of an answer, draws, resamples."""
LARGEST_SEED = 2**32 - 1


def whole_number(least: int, most: int = MOST) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number between two bounds, both included."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text!r}")
        return value

    return read


def finite_number(least: float, most: float) -> Callable[[str], float]:
    """The `type` of an argument that is a number between two bounds, both included."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:  # NaN is not
            raise argparse.ArgumentTypeError(f"must be a number from {least:g} to {most:g}, got {text!r}")
        return value

    return read
