"""`laser-fast significance`: whether two runs differ on the same users."""

import argparse

from laser_fast.cli.arguments import whole_number
from laser_fast.cli.runs import add_measurement, load_runs, rows_to_rank, write_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast significance RUN_A RUN_B`."""
    parser.add_argument("first", metavar="RUN_A")
    parser.add_argument("second", metavar="RUN_B")
    add_measurement(parser)
    parser.add_argument("--metrics", nargs="+", default=["HR@10", "NDCG@10", "MRR"], metavar="METRIC")
    parser.add_argument("--resamples", type=whole_number(1), default=10_000, metavar="N", help="default: 10000")


def run(parsed: argparse.Namespace) -> None:
    """Rank with both runs and print the difference of every metric."""
    from laser_fast.evaluation import evaluate, paired_significance

    ranks, rule = [], ""
    for model, inputs, config in load_runs(parsed, (parsed.first, parsed.second)):
        rule, scorer = inputs.split.rule, model if model.calibration is None else model.calibration
        ranks.append(evaluate(scorer, rows_to_rank(parsed, inputs), batch_size=config.evaluation.batch_size).ranks)
    results = [
        paired_significance(ranks[0], ranks[1], metric, resamples=parsed.resamples, seed=parsed.seed)
        for metric in parsed.metrics
    ]
    print(f"{parsed.first} - {parsed.second}")
    for result in results:
        print(f"  {result}")
    print(
        f"{results[0].rows:,} {parsed.split} rows, full ranking; {rule}; [] are 95% bootstrap intervals, p of a paired "
        f"permutation test with {parsed.resamples:,} draws; nothing is corrected for looking at several metrics"
    )
    write_figures(parsed.output, {"rule": rule, "differences": [result.to_dict() for result in results]})
