"""`laser-fast report`: one page about a run."""

import argparse
from pathlib import Path

from laser_fast.cli.runs import add_run, load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast report RUN`."""
    add_run(parser)
    parser.add_argument("--output", metavar="FOLDER", help="where it goes (default: RUN/report)")


def run(parsed: argparse.Namespace) -> None:
    """Write the page; without a model in the run it has the curves alone."""
    import torch

    from laser_fast.laser.build import training_counts
    from laser_fast.reports import Subject, check_report_folder, read_run, write_report

    record, subject = read_run(parsed.model), None
    folder = Path(parsed.output) if parsed.output else Path(parsed.model) / "report"
    check_report_folder(folder)
    if record.kept is not None:
        model, inputs, config = load_run(parsed, parsed.model)
        counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
        tables, size = inputs.tables(config.evaluation), config.evaluation.batch_size
        subject = Subject(model, inputs.dataset, inputs.split, counts, inputs.recommender, tables, size)
    print(f"written to {write_report(record, subject, folder)}")
