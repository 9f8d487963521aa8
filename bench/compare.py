"""Hold a run of the benchmarks against a stored one by their ratios; absolute times are never compared.

    pytest bench --benchmark-only --benchmark-json=new.json
    python bench/compare.py new.json bench/results/cpu/bench-all.json --margin 0.15

Compared are the speed-ups over baselines of the same run (`speedup_over_*`) and, on the same device, the share of its
copy speed (`roofline_fraction`); of all, more is better. Exit status: 0 nothing fell, 1 a ratio fell by more than the
margin or is gone (each is named), 2 the files cannot be compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MARGIN = 0.15
_ON_ANY_DEVICE, _ON_ONE_DEVICE = "speedup_over_", "roofline_fraction"


class UnusableInput(Exception):
    """The two runs cannot be compared."""


@dataclass(frozen=True)
class Recorded:
    """What a file of pytest-benchmark says: the GPU, or else the processor, and (benchmark, ratio) -> value."""

    device: str
    ratios: dict[tuple[str, str], float]


@dataclass(frozen=True)
class Difference:
    """A ratio of the stored run and of the new one; None where a run has none."""

    benchmark: str
    ratio: str
    stored: float | None
    new: float | None

    def fell(self, margin: float) -> bool:
        """Whether it is gone or smaller by more than that share of it."""
        if self.stored is None:
            return False
        return self.new is None or self.new < self.stored * (1 - margin)


def read(path: Path) -> Recorded:
    """Read a file written with `--benchmark-json`.

    Raises:
        UnusableInput: no such file, no JSON of pytest-benchmark, a ratio that is no number, or no ratio at all.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnusableInput(f"compare: {path} must be a JSON file, got {error}") from error
    try:
        machine = content["machine_info"]
        device = machine.get("gpu") or machine["cpu"]["brand_raw"]
        recorded = [(entry["fullname"], entry["extra_info"].items()) for entry in content["benchmarks"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableInput(f"compare: {path} must be written by --benchmark-json, got no {error}") from error
    ratios = {(name, key): value for name, values in recorded for key, value in values if _is_ratio(key)}
    for (name, key), value in ratios.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnusableInput(f"compare: {key} of {name} in {path} must be a number, got {value!r}")
    if not ratios:
        raise UnusableInput(f"compare: {path} must hold ratios, got none in {len(recorded)} benchmarks")
    return Recorded(str(device), ratios)


def _is_ratio(key: str) -> bool:
    return key.startswith(_ON_ANY_DEVICE) or key == _ON_ONE_DEVICE


def differences(new: Recorded, stored: Recorded, *, other_device: bool = False) -> list[Difference]:
    """Every ratio of either run beside that of the other, in order of their names.

    The share of the copy speed is left out of runs of two devices, which only `other_device` allows.
    """
    if new.device != stored.device and not other_device:
        raise UnusableInput(
            f"compare: both runs must be of one device, got {new.device!r} and {stored.device!r}; "
            "--other-device compares the speed-ups all the same"
        )
    keys = sorted(new.ratios.keys() | stored.ratios.keys())
    return [
        Difference(*key, stored.ratios.get(key), new.ratios.get(key))
        for key in keys
        if new.device == stored.device or key[1] != _ON_ONE_DEVICE
    ]


def table(found: Sequence[Difference], margin: float) -> str:
    """One line a ratio: name, stored, new, new / stored, and a mark where it fell."""
    lines = [f"{'ratio':100}{'stored':>9}{'new':>9}{'new/stored':>12}"]
    for one in found:
        stored, new = ("-" if value is None else f"{value:.3f}" for value in (one.stored, one.new))
        change = f"{one.new / one.stored:.3f}" if one.stored and one.new is not None else "-"
        mark = "  fell" if one.fell(margin) else ""
        lines.append(f"{f'{one.benchmark} {one.ratio}':100}{stored:>9}{new:>9}{change:>12}{mark}")
    return "\n".join(lines)


def complaints(found: Sequence[Difference], new: Recorded, stored: Recorded, margin: float) -> list[str]:
    """What fell or is gone, one line each; a benchmark that is gone is named once."""
    gone = sorted({name for name, _ in stored.ratios} - {name for name, _ in new.ratios})
    lines = [f"{name}: not in the new run" for name in gone]
    for one in found:
        if one.benchmark not in gone and one.fell(margin):
            value = "is gone" if one.new is None else f"fell to {one.new:.3f}"
            lines.append(f"{one.benchmark}: {one.ratio} {value}, stored is {one.stored:.3f}, margin {margin:.0%}")
    return lines


def main(words: Sequence[str] | None = None) -> int:
    """Compare two files; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path, help="JSON of the new run")
    parser.add_argument("stored", type=Path, help="JSON of the stored run")
    parser.add_argument("--margin", type=_share, default=MARGIN, help="share by which a ratio may fall (%(default)s)")
    parser.add_argument("--other-device", action="store_true", help="compare the speed-ups of two different devices")
    arguments = parser.parse_args(words)
    try:
        new, stored = read(arguments.new), read(arguments.stored)
        found = differences(new, stored, other_device=arguments.other_device)
    except UnusableInput as error:
        print(error, file=sys.stderr)
        return 2
    print(table(found, arguments.margin))
    problems = complaints(found, new, stored, arguments.margin)
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


def _share(word: str) -> float:
    if not 0 <= float(word) < 1:
        raise argparse.ArgumentTypeError(f"margin must be from 0 to 1, got {word}")
    return float(word)


if __name__ == "__main__":
    sys.exit(main())
