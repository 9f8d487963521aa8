"""The commands: one file each, with its arguments (`add_arguments`) and its few lines over the library (`run`).

A command imports what needs torch when it runs, so that the others start fast.
"""

import argparse
import sys
from collections.abc import Sequence

from laser_fast import __version__
from laser_fast.cli import compare, doctor, evaluate, plan, prepare, recommend, recommender, report, significance, train
from laser_fast.cli.output import Parser, report_error, safe_output

__all__ = ["main", "parser"]

_COMMANDS = (
    (prepare, "turn interaction logs and item files into a data set"),
    (recommender, "the ID-based recommender that M-Former reads"),
    (train, "train Laser by a configuration"),
    (plan, "how much memory training needs, and what to set for a GPU"),
    (evaluate, "rank for every test user: the whole catalogue, or candidates"),
    (significance, "do two runs differ on the same test users?"),
    (compare, "Laser beside the baselines, on the test users"),
    (recommend, "recommend for users of the data set, or for a history of item ids"),
    (report, "one page about a run: curves, what the experts do, who is served well, samples"),
    (doctor, "what is installed, what runs, and why not"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, or that of `report_error`, which has told why on stderr."""
    trace = False
    with safe_output():
        try:
            parsed = parser().parse_args(arguments)
            trace = parsed.traceback
            status = int(parsed.run(parsed) or 0)
            if sys.stdout is not None:
                sys.stdout.flush()  # an error of it has to be told here
            return status
        except (Exception, KeyboardInterrupt) as error:
            return report_error(error, trace=trace)


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments; `parse_args(...).run` is the function of the command."""
    root = Parser(prog="laser-fast", description="LLM-based sequential recommendation on one GPU.")
    root.add_argument("--version", action="version", version=f"laser-fast {__version__}")
    root.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for module, text in _COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=text)
        command.set_defaults(command=name, run=module.run)
        module.add_arguments(command)
    return root
