"""The attacks one after the other, each with its share of the time, and the file that keeps what they found."""

import argparse
import importlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recording import parser_of
from reporting.reasons import without_paths

from attacking.attack import Line, Scope
from attacking.children import Findings, one_thread
from attacking.table import RESULTS, put_into_page
from attacking.world import World

# by module, with what each may take of the time that is left, as a share of what it and those after it may take
ATTACKS = {"kills": 3, "damages": 4, "inputs": 5, "operations": 3, "threads": 3, "starts": 2, "places": 3}
_FILE = "attack.json"
_MAX_AT_ONCE = 4


def main(description: str, arguments: Sequence[str] | None = None) -> int:
    """Attack, or write the table; 1 if anything was lost."""
    parser = _parser(description)
    parsed = parser.parse_args(arguments)
    if parsed.table:
        put_into_page(RESULTS)
        return 0
    if parsed.out is None:
        parser.error("OUT must be named, unless --table is asked for")
    parsed.out.mkdir(parents=True)
    words = [without_paths(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    lines = _attack(parsed, shlex.join(["python", "bench/attack.py", *words]))
    lost, idle = sum(line["lost"] for line in lines), dict.fromkeys(line["name"] for line in lines if line["not_run"])
    print(f"lost: {lost} of {sum(line['tried'] for line in lines):,}; not run: {', '.join(idle) or 'nothing'}")
    return int(lost > 0)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = parser_of(description)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=14.0, help="no trial begins later (default: 14)")
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), metavar="NAME")
    parser.add_argument("--rehearse", action="store_true", help="everything once; no figure is kept")
    parser.add_argument("--table", action="store_true", help="write the table of the page")
    return parser


def _attack(parsed: argparse.Namespace, command: str) -> list[Line]:
    from laser_fast.runs.run_directory import describe_environment

    modules = {name: importlib.import_module(f"attacking.{name}") for name in ATTACKS}
    one_thread()
    begin = time.monotonic()
    end = begin + 60 * parsed.minutes
    report: dict[str, Any] = {"command": command, "seed": parsed.seed, "environment": describe_environment()}
    report |= {"rehearsal": parsed.rehearse, "seconds": 0.0, "lines": []}
    scratch = (parsed.out / "scratch").resolve()
    world = World(scratch / "world")

    def take(line: Line) -> None:
        report["lines"].append(line)
        report["seconds"] = round(time.monotonic() - begin, 1)
        (parsed.out / _FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(line), flush=True)

    at_once = max(2, min(os.cpu_count() or 1, _MAX_AT_ONCE))
    chosen = [name for name in ATTACKS if name in parsed.only]
    for place, name in enumerate(chosen):
        share = ATTACKS[name] / sum(ATTACKS[other] for other in chosen[place:])
        now = time.monotonic()
        until = now + share * (end - now)
        drawn = {"seed": parsed.seed, "rehearse": parsed.rehearse}
        scope = Scope(world=world, folder=scratch / name, until=until, at_once=at_once, take=take, **drawn)
        scope.folder.mkdir()
        try:
            modules[name].attack(scope)
        except Exception as error:  # what it needs could not be made: the others are tried all the same
            scope.report(name, name, Findings({"died": 1}, 1, [f"{type(error).__name__}: {error}"]), 0.0)
        shutil.rmtree(scope.folder)
    shutil.rmtree(scratch)
    return report["lines"]
