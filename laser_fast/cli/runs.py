"""What the commands about runs share: where things are now, runs and their rows, figures written as JSON."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_fast.cli.arguments import LARGEST_SEED, whole_number

if TYPE_CHECKING:
    from laser_fast.data import EvaluationRows
    from laser_fast.laser.build import Inputs
    from laser_fast.runs.checkpoint import Run


def add_run(command: argparse.ArgumentParser) -> None:
    """Add one run, and what it was built on."""
    command.add_argument("model", metavar="RUN", help="run directory written by train")
    _add_places(command)


def _add_places(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", help="where the data set is now, if it moved")
    command.add_argument("--recommender", help="where the recommender is now, if it moved")
    command.add_argument("--llm", help="where the language model is now, or hub:OWNER/NAME to fetch it")


def add_measurement(command: argparse.ArgumentParser) -> None:
    """Add what the runs were built on, which rows are ranked, and where the figures go."""
    _add_places(command)
    command.add_argument("--split", choices=("test", "valid"), default="test")
    command.add_argument("--seed", type=whole_number(0, LARGEST_SEED), default=0, help="of what is drawn")
    add_output(command)


def add_output(command: argparse.ArgumentParser) -> None:
    """Add where `write_figures` writes."""
    command.add_argument("--output", help="also write the figures to this JSON file")


def load_run(parsed: argparse.Namespace, run: str) -> "Run":
    """The run in this directory, with its data, recommender and language model where the arguments say."""
    from laser_fast.runs.checkpoint import Run

    return Run.load(run, data=parsed.data, recommender=parsed.recommender, llm=parsed.llm)


def load_runs(parsed: argparse.Namespace, runs: Sequence[str], command: str) -> "Iterator[Run]":
    """`load_run` of each, after all were found; of another split than the first none may be."""
    from laser_fast.runs.checkpoint import find_run

    for run in runs:
        find_run(Path(run))
    split_hash = None
    for run in runs:
        loaded = load_run(parsed, run)
        found = loaded.inputs.split.hash
        split_hash = split_hash or found
        if found != split_hash:
            raise ValueError(f"{command}: runs must have one split, got {split_hash[:12]} and {found[:12]}")
        yield loaded


def rows_to_rank(parsed: argparse.Namespace, inputs: "Inputs") -> "EvaluationRows":
    """The rows of `--split`."""
    rows = inputs.split.test if parsed.split == "test" else inputs.split.valid
    if not len(rows):
        raise ValueError(f"evaluate: --split must name a part with rows, got {parsed.split!r} and none there")
    return rows


def write_figures(path: str | None, figures: Any) -> None:
    """Write figures with the command and the environment as JSON; nothing without a path."""
    if path is None:
        return
    from laser_fast.files.folders import replace_json
    from laser_fast.runs.run_directory import describe_environment

    command = "laser-fast " + " ".join(sys.argv[1:])
    replace_json(Path(path).resolve(), {"command": command, "environment": describe_environment(), "figures": figures})
