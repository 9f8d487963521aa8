"""The commands that measure: `evaluate` one run or several, and `significance` between two."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_fast.cli.numbers import LARGEST_SEED, whole_number

if TYPE_CHECKING:
    from laser_fast.config import LaserConfig
    from laser_fast.data import EvaluationRows
    from laser_fast.evaluation import Candidates, RankingMetrics
    from laser_fast.laser import LaserModel
    from laser_fast.laser.build import Inputs
    from laser_fast.recommenders import Scorer

COSINE, LASER = "Laser, cosine only", "Laser"


def add_evaluation_commands(commands: Any) -> None:
    """Add `evaluate` and `significance` to the parsers of commands."""
    command = commands.add_parser("evaluate", help="rank for every test user: the whole catalogue, or candidates")
    command.add_argument("model", nargs="+", metavar="RUN", help="run directory; several: their mean and spread")
    _add_common(command)
    command.add_argument(
        "--protocol",
        choices=("full", "uniform", "popularity", "llara"),
        default="full",
        help="full: the whole catalogue (default); else drawn candidates; llara: the target and 19 uniform ones, HR@1",
    )
    command.add_argument(
        "--candidates", type=whole_number(2), default=100, metavar="N", help="of a ranking, the target included"
    )
    command.add_argument(
        "--draws", type=whole_number(1), default=20, metavar="N", help="draws of candidates to average over"
    )
    command.add_argument("--candidates-file", metavar="FILE", help="read the candidates from here, or store them here")
    command.add_argument(
        "--bootstrap", type=whole_number(1), metavar="N", help="also bootstrap intervals, of N resamples"
    )
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("significance", help="do two runs differ on the same test users?")
    command.add_argument("first", metavar="RUN_A")
    command.add_argument("second", metavar="RUN_B")
    _add_common(command)
    command.add_argument("--metrics", nargs="+", default=["HR@10", "NDCG@10", "MRR"], metavar="METRIC")
    command.add_argument(
        "--resamples", type=whole_number(1), default=10_000, metavar="N", help="random signs (default: 10000)"
    )
    command.set_defaults(run=_significance)


def add_places(command: argparse.ArgumentParser) -> None:
    """Add where the things are now that a run was built on."""
    command.add_argument("--data", help="where the data set is now, if it moved")
    command.add_argument("--recommender", help="where the recommender is now, if it moved")
    command.add_argument("--llm", help="where the language model is now, or hub:OWNER/NAME to fetch it")


def _add_common(command: argparse.ArgumentParser) -> None:
    add_places(command)
    command.add_argument("--split", choices=("test", "valid"), default="test")
    command.add_argument("--seed", type=whole_number(0, LARGEST_SEED), default=0, help="of what is drawn")
    command.add_argument("--output", help="also write the figures to this JSON file")


def _evaluate(parsed: argparse.Namespace) -> None:
    from laser_fast.evaluation import across_seeds, cold_line, group_figures, table
    from laser_fast.laser.build import training_counts

    _check_before(parsed, parsed.model)
    measured: dict[str, dict[str, RankingMetrics]] = {}
    figures: dict[str, Any] = {}
    rows = counts = rule = split_hash = None
    for run in parsed.model:
        model, inputs, config = load_run(parsed, run)
        _check_same_split("evaluate", split_hash, inputs.split.hash)
        split_hash, rule = inputs.split.hash, inputs.split.rule
        rows, counts = _rows(parsed, inputs), training_counts(inputs.split, model.num_items)
        measured[run] = _measure(parsed, model, rows, counts, config.evaluation.batch_size)
        figures[run] = {name: metrics.to_dict() for name, metrics in measured[run].items()}
        if len(parsed.model) > 1:
            print(run)
        print(table(measured[run]))
        _print_bootstrap(parsed, measured[run])
        if parsed.protocol == "full":
            for name, metrics in measured[run].items():
                figures[run][name]["groups"] = group_figures(metrics, rows, counts)
            best = LASER if LASER in measured[run] else COSINE
            print(f"{best}, {cold_line(measured[run][best], rows, counts)}")
    if len(parsed.model) == 1:
        figures = figures[parsed.model[0]]
    else:
        names = [name for name in measured[parsed.model[0]] if all(name in run for run in measured.values())]
        spreads = {name: across_seeds([run[name] for run in measured.values()]) for name in names}
        print(f"mean of {len(measured)} runs (sample deviation of their figures)\n{table(spreads)}")
        spread = {name: {key: value.to_dict() for key, value in spreads[name].items()} for name in names}
        figures = {"runs": figures, "spread": spread}
    print(f"{parsed.split} rows, {_protocol_words(parsed)}; {rule}; +- are 95% intervals over users")
    write_figures(parsed.output, figures)


def _check_before(parsed: argparse.Namespace, runs: Sequence[str]) -> None:
    """Refuse what would otherwise be found out after the first run was ranked for minutes."""
    from laser_fast.runs.checkpoint import find_run

    if getattr(parsed, "bootstrap", None) is not None and parsed.protocol != "full":
        raise ValueError(f"evaluate: --bootstrap is for the full ranking, got --protocol {parsed.protocol}")
    for run in runs:
        find_run(Path(run))


def _measure(
    parsed: argparse.Namespace, model: "LaserModel", rows: "EvaluationRows", counts: Any, batch_size: int
) -> "dict[str, RankingMetrics]":
    from laser_fast.evaluation import evaluate, evaluate_candidates

    scorers: dict[str, Scorer] = {COSINE: model}
    if model.calibration is not None:
        scorers[LASER] = model.calibration
    if parsed.protocol == "full":
        return {name: evaluate(scorer, rows, batch_size=batch_size) for name, scorer in scorers.items()}
    candidates = _candidates(parsed, rows, counts)
    return {
        name: evaluate_candidates(scorer, rows, candidates, batch_size=batch_size) for name, scorer in scorers.items()
    }


def _candidates(parsed: argparse.Namespace, rows: "EvaluationRows", counts: Any) -> "Candidates":
    from laser_fast.evaluation import Candidates, draw_candidates, llara_candidates

    if parsed.candidates_file is not None and Path(parsed.candidates_file).exists():
        candidates = Candidates.load(parsed.candidates_file)
        popular = candidates.sampler == "popularity"
        if popular != (parsed.protocol == "popularity"):
            raise ValueError(
                f"evaluate: --candidates-file must hold candidates of --protocol {parsed.protocol}, "
                f"got {candidates.sampler} ones"
            )
        return candidates
    if parsed.protocol == "llara":
        candidates = llara_candidates(rows, len(counts), draws=parsed.draws, seed=parsed.seed)
    else:
        weights = counts if parsed.protocol == "popularity" else None
        candidates = draw_candidates(
            rows, len(counts), parsed.candidates, draws=parsed.draws, seed=parsed.seed, counts=weights
        )
    if parsed.candidates_file is not None:
        candidates.save(parsed.candidates_file)
    return candidates


def _print_bootstrap(parsed: argparse.Namespace, measured: "dict[str, RankingMetrics]") -> None:
    if parsed.bootstrap is None:
        return
    from laser_fast.evaluation import bootstrap_interval, rank_values

    for name, metrics in measured.items():
        for metric in ("HR@10", "NDCG@10", "MRR"):
            values = rank_values(metrics.ranks, metric)
            low, high = bootstrap_interval(values, resamples=parsed.bootstrap, seed=parsed.seed)
            print(f"{name}, {metric}: 95% bootstrap interval [{low:.4f}, {high:.4f}]")


def _protocol_words(parsed: argparse.Namespace) -> str:
    if parsed.protocol == "full":
        return "full ranking, history items not filtered"
    size = 20 if parsed.protocol == "llara" else parsed.candidates
    kind = "by popularity" if parsed.protocol == "popularity" else "uniformly"
    drawn = (
        f"from {parsed.candidates_file}" if parsed.candidates_file else f"{parsed.draws} draws of seed {parsed.seed}"
    )
    return f"sampled ranking, no full one: the target among {size} candidates drawn {kind} outside the history, {drawn}"


def _significance(parsed: argparse.Namespace) -> None:
    from laser_fast.evaluation import evaluate, paired_significance

    _check_before(parsed, (parsed.first, parsed.second))
    ranks, split_hash, rule = [], None, None
    for run in (parsed.first, parsed.second):
        model, inputs, config = load_run(parsed, run)
        _check_same_split("significance", split_hash, inputs.split.hash)
        split_hash, rule = inputs.split.hash, inputs.split.rule
        scorer = model if model.calibration is None else model.calibration
        ranks.append(evaluate(scorer, _rows(parsed, inputs), batch_size=config.evaluation.batch_size).ranks)
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


def _check_same_split(command: str, before: str | None, after: str) -> None:
    if before is not None and before != after:
        raise ValueError(f"{command}: runs must have one split, got {before[:12]} and {after[:12]}")


def _rows(parsed: argparse.Namespace, inputs: "Inputs") -> "EvaluationRows":
    rows = inputs.split.test if parsed.split == "test" else inputs.split.valid
    if not len(rows):
        raise ValueError(f"evaluate: --split must name a part with rows, got {parsed.split!r} and none there")
    return rows


def load_run(parsed: argparse.Namespace, run: str) -> "tuple[LaserModel, Inputs, LaserConfig]":
    """The model of a run directory, what it was built on, and its configuration."""
    from laser_fast.runs.checkpoint import load_laser

    return load_laser(run, data=parsed.data, recommender=parsed.recommender, llm=parsed.llm)


def write_figures(path: str | None, figures: Any) -> None:
    """Write figures with the command and the environment as JSON; nothing without a path."""
    if path is None:
        return
    from laser_fast.files.folders import replace_json
    from laser_fast.runs.run_directory import describe_environment

    command = "laser-fast " + " ".join(sys.argv[1:])
    replace_json(Path(path).resolve(), {"command": command, "environment": describe_environment(), "figures": figures})
