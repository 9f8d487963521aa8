"""Arguments and steps that the commands about runs share."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_fast.cli.arguments import SEED
from laser_fast.data import EvaluationRows
from laser_fast.files.atomic import replace_json

if TYPE_CHECKING:
    from laser_fast.laser.build import Inputs
    from laser_fast.runs.checkpoint import Run


def add_run(command: argparse.ArgumentParser) -> None:
    """Add one run, and where what it was built on is now."""
    command.add_argument("model", metavar="RUN", help="run directory written by train")
    _add_places(command)


def _add_places(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", help="where the data set is now, if it moved")
    command.add_argument("--recommender", help="where the recommender is now, if it moved")
    command.add_argument("--llm", help="where the language model is now, or hub:OWNER/NAME to fetch it")


def add_measurement(command: argparse.ArgumentParser) -> None:
    """Add which rows of the runs are ranked, where what they were built on is now, and `--output`."""
    _add_places(command)
    command.add_argument("--split", choices=("test", "valid"), default="test")
    command.add_argument("--seed", type=SEED, default=0, help="of what is drawn")
    add_output(command)


def add_output(command: argparse.ArgumentParser) -> None:
    """Add `--output`, the path of `write_figures`."""
    command.add_argument("--output", help="also write the figures to this JSON file")


def load_run(parsed: argparse.Namespace, run: str) -> "Run":
    """The run in this directory, with its data, recommender and language model where the arguments say."""
    from laser_fast.runs.checkpoint import Run

    return Run.load(run, data=parsed.data, recommender=parsed.recommender, llm=parsed.llm)


def load_runs(parsed: argparse.Namespace, runs: Sequence[str]) -> "Iterator[Run]":
    """`load_run` of each, after all were found; they must have one split."""
    from laser_fast.runs.checkpoint import find_run

    for run in runs:
        find_run(Path(run))
    first = None
    for run in runs:
        loaded = load_run(parsed, run)
        found = loaded.inputs.split.hash
        first = first or found
        if found != first:
            raise ValueError(f"{parsed.command}: runs must have one split, got {first[:12]} and {found[:12]}")
        yield loaded


def rows_to_rank(parsed: argparse.Namespace, inputs: "Inputs") -> EvaluationRows:
    """The rows of `--split`."""
    rows = inputs.split.test if parsed.split == "test" else inputs.split.valid
    if not len(rows):
        raise ValueError(f"{parsed.command}: --split must name a part with rows, got {parsed.split!r} without any")
    return rows


def write_figures(path: str | None, figures: Any) -> None:
    """Write figures, the command and the environment as JSON, where there is a path."""
    if path is None:
        return
    from laser_fast.runs.run_directory import describe_environment

    command = "laser-fast " + " ".join(sys.argv[1:])
    replace_json(Path(path).resolve(), {"command": command, "environment": describe_environment(), "figures": figures})
