"""`laser-fast evaluate`: rank for every user with one run or several."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_fast.cli.arguments import whole_number
from laser_fast.cli.runs import add_measurement, load_runs, rows_to_rank, write_figures
from laser_fast.data import EvaluationRows

if TYPE_CHECKING:
    from laser_fast.evaluation import Candidates, RankingMetrics
    from laser_fast.laser import LaserModel
    from laser_fast.recommenders import Scorer

COSINE, LASER = "Laser, cosine only", "Laser"
_PROTOCOLS = ("full", "uniform", "popularity", "llara")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast evaluate RUN...`."""
    parser.add_argument("model", nargs="+", metavar="RUN", help="run directory; several: their mean and spread")
    add_measurement(parser)
    ranked = "full: the whole catalogue (default); else drawn candidates; llara: the target and 19 uniform ones, HR@1"
    parser.add_argument("--protocol", choices=_PROTOCOLS, default="full", help=ranked)
    size = "of a ranking, the target included"
    parser.add_argument("--candidates", type=whole_number(2), default=100, metavar="N", help=size)
    parser.add_argument("--draws", type=whole_number(1), default=20, metavar="N", help="of candidates, to average over")
    parser.add_argument("--candidates-file", metavar="FILE", help="read the candidates from here, or store them here")
    parser.add_argument("--bootstrap", type=whole_number(1), metavar="N", help="also intervals, of N resamples")


def run(parsed: argparse.Namespace) -> None:
    """Print the figures of every run, and of several their mean and spread."""
    from laser_fast.evaluation import across_seeds, cold_line, group_figures, table
    from laser_fast.laser.build import training_counts

    if parsed.bootstrap is not None and parsed.protocol != "full":
        raise ValueError(f"evaluate: --bootstrap is for the full ranking, got --protocol {parsed.protocol}")
    measured: dict[str, dict[str, RankingMetrics]] = {}
    figures: dict[str, Any] = {}
    rule = ""
    for name, (model, inputs, config) in zip(parsed.model, load_runs(parsed, parsed.model), strict=True):
        rule, rows = inputs.split.rule, rows_to_rank(parsed, inputs)
        counts = training_counts(inputs.split, model.num_items)
        systems = measured[name] = _measure(parsed, model, rows, counts, config.evaluation.batch_size)
        figures[name] = {system: metrics.to_dict() for system, metrics in systems.items()}
        if len(parsed.model) > 1:
            print(name)
        print(table(systems))
        if parsed.bootstrap is not None:
            _print_bootstrap(parsed, systems)
        if parsed.protocol == "full":
            for system, metrics in systems.items():
                figures[name][system]["groups"] = group_figures(metrics, rows, counts)
            best = LASER if LASER in systems else COSINE
            print(f"{best}, {cold_line(systems[best], rows, counts)}")
    if len(parsed.model) == 1:
        figures = figures[parsed.model[0]]
    else:
        shared = [system for system in (COSINE, LASER) if all(system in systems for systems in measured.values())]
        spreads = {system: across_seeds([systems[system] for systems in measured.values()]) for system in shared}
        print(f"mean of {len(measured)} runs (sample deviation of their figures)\n{table(spreads)}")
        spread = {
            system: {metric: value.to_dict() for metric, value in found.items()} for system, found in spreads.items()
        }
        figures = {"runs": figures, "spread": spread}
    print(f"{parsed.split} rows, {_protocol_words(parsed)}; {rule}; +- are 95% intervals over users")
    write_figures(parsed.output, figures)


def _measure(
    parsed: argparse.Namespace, model: "LaserModel", rows: EvaluationRows, counts: Any, batch_size: int
) -> "dict[str, RankingMetrics]":
    from laser_fast.evaluation import evaluate, evaluate_candidates

    scorers: dict[str, Scorer] = {COSINE: model}
    if model.calibration is not None:
        scorers[LASER] = model.calibration
    if parsed.protocol == "full":
        return {name: evaluate(scorer, rows, batch_size=batch_size) for name, scorer in scorers.items()}
    drawn = _candidates(parsed, rows, counts)
    return {name: evaluate_candidates(scorer, rows, drawn, batch_size=batch_size) for name, scorer in scorers.items()}


def _candidates(parsed: argparse.Namespace, rows: EvaluationRows, counts: Any) -> "Candidates":
    from laser_fast.evaluation import Candidates, draw_candidates, llara_candidates

    popular, file = parsed.protocol == "popularity", parsed.candidates_file
    if file is not None and Path(file).exists():
        candidates = Candidates.load(file)
        if popular != (candidates.sampler == "popularity"):
            raise ValueError(
                f"evaluate: --candidates-file must hold candidates of --protocol {parsed.protocol}, "
                f"got {candidates.sampler} ones"
            )
        return candidates
    drawn: dict[str, Any] = {"draws": parsed.draws, "seed": parsed.seed}
    if parsed.protocol == "llara":
        candidates = llara_candidates(rows, len(counts), **drawn)
    else:
        weights = counts if popular else None
        candidates = draw_candidates(rows, len(counts), parsed.candidates, counts=weights, **drawn)
    if file is not None:
        candidates.save(file)
    return candidates


def _print_bootstrap(parsed: argparse.Namespace, systems: "dict[str, RankingMetrics]") -> None:
    from laser_fast.evaluation import bootstrap_interval, rank_values

    for name, metrics in systems.items():
        for metric in ("HR@10", "NDCG@10", "MRR"):
            values = rank_values(metrics.ranks, metric)
            low, high = bootstrap_interval(values, resamples=parsed.bootstrap, seed=parsed.seed)
            print(f"{name}, {metric}: 95% bootstrap interval [{low:.4f}, {high:.4f}]")


def _protocol_words(parsed: argparse.Namespace) -> str:
    if parsed.protocol == "full":
        return "full ranking, history items not filtered"
    size = 20 if parsed.protocol == "llara" else parsed.candidates
    kind = "by popularity" if parsed.protocol == "popularity" else "uniformly"
    file = parsed.candidates_file
    drawn = f"from {file}" if file else f"{parsed.draws} draws of seed {parsed.seed}"
    return f"sampled ranking, no full one: the target among {size} candidates drawn {kind} outside the history, {drawn}"
