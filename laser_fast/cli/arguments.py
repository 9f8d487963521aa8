"""Arguments that several commands have: numbers between bounds, and a configuration with `--set`."""

import argparse
import math
from collections.abc import Callable

_MOST = 10**6  # items of an answer, draws, resamples: what a command loops over or holds at once


def whole_number(least: int, most: int = _MOST) -> Callable[[str], float]:
    """The `type` of an argument that is a whole number between two bounds, both included."""
    return _number(int, f"a whole number from {least} to {most}", least, most)


def finite_number(least: float, most: float) -> Callable[[str], float]:
    """The `type` of an argument that is a number between two bounds, both included."""
    return _number(float, f"a number from {least:g} to {most:g}", least, most)


def _number(kind: Callable[[str], float], rule: str, least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:  # NaN is not
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return read


SEED = whole_number(0, 2**32 - 1)


def add_config(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the configuration of a training run, and `--set`."""
    parser.add_argument("config", help="YAML file")
    add_settings(parser, example)


def add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    """Add `--set`, which changes the configuration."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"override one setting, e.g. --set {example}"
    )
