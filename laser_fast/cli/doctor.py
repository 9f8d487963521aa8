"""`laser-fast doctor`: what is installed and what runs, one line per component or as JSON."""

import argparse
import json
from dataclasses import asdict

from laser_fast import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast doctor`."""
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(parsed: argparse.Namespace) -> int:
    """Print the report; returns 1 where something that laser_fast needs is off, else 0."""
    from laser_fast.doctor import diagnose

    components = diagnose()
    if parsed.json:
        print(json.dumps({"version": __version__, "components": [asdict(c) for c in components]}, indent=1))
    else:
        width = max(len(component.name) for component in components)
        for one in components:
            line = f"{'on ' if one.on else 'off'}  {one.name:<{width}}  {one.version:<16}  {one.reason}"
            print((line + (f"  -> {one.remedy}" if one.remedy else "")).rstrip().replace("\n", " "))
    return int(any(component.required and not component.on for component in components))
