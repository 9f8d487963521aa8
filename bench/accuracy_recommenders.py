"""Accuracy of the recommenders that work on item ids alone: baselines once, SASRec or GRU4Rec with several seeds.

    python bench/accuracy_recommenders.py --data runs/amazon-scientific --seeds 3 \
        --out bench/results/cpu/recommenders-amazon-scientific.json
    python bench/accuracy_recommenders.py --data runs/amazon-scientific --seeds 1 --set kind=gru4rec \
        --out bench/results/cpu/gru4rec-amazon-scientific.json

`--data` is a folder written by `laser-fast prepare`. Settings were chosen on validation rows; test rows are ranked once
per model. With `OMP_NUM_THREADS=1` the figures are those of one thread.
"""

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from recording import parser_of, record

from laser_fast.config import RecommenderConfig, apply_overrides, build_config, load_config
from laser_fast.data import SequenceDataset, Split, leave_one_out
from laser_fast.evaluation import RankingMetrics, evaluate, fit_calibration, table
from laser_fast.recommenders import ItemKNN, Markov1, Popularity, Scorer
from laser_fast.training.recommender.train_recommender import train_recommender

_COLUMNS = ("HR@1", "HR@10", "NDCG@10", "MRR")


def figures(scorer: Scorer, split: Split) -> tuple[dict[str, Any], RankingMetrics]:
    """Validation and test metrics of one model as plain numbers, and the test metrics themselves."""
    valid, test = evaluate(scorer, split.valid), evaluate(scorer, split.test)
    return {"valid": valid.to_dict()["metrics"], "test": test.to_dict()["metrics"]}, test


def spread(runs: list[dict[str, Any]], part: str) -> dict[str, dict[str, float]]:
    """Mean and sample deviation of every metric over the seeds."""
    result = {}
    for name in runs[0][part]:
        values = [run[part][name]["mean"] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        result[name] = {"mean": statistics.fmean(values), "deviation": deviation}
    return result


def main() -> None:
    """Train, rank, print a table, write JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", required=True, help="folder written by `laser-fast prepare`")
    parser.add_argument("--seeds", type=int, default=3, help="the recommender is trained with seeds 0..SEEDS-1")
    parser.add_argument("--config", help="YAML file with settings of the recommender; the defaults otherwise")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--out", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    dataset = SequenceDataset.load(arguments.data)
    split = leave_one_out(dataset)
    if arguments.config:
        config = load_config(RecommenderConfig, arguments.config, arguments.set)
    else:
        config = build_config(RecommenderConfig, apply_overrides({}, arguments.set))
    counts = torch.bincount(torch.tensor(split.train.items), minlength=dataset.num_items)
    systems, shown = {}, {}
    for kind in (Popularity, Markov1, ItemKNN):
        fitted = kind.fit(split.train.items, split.train.cu_seqlens, dataset.num_items)
        systems[kind.__name__], shown[kind.__name__] = figures(fitted, split)
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        model = train_recommender(split, dataset.num_items, config, seed=seed)
        training_time_s = time.perf_counter() - start
        name = type(model).__name__
        run, shown[f"{name}, seed {seed}"] = figures(model, split)
        calibrated, _ = fit_calibration({config.kind: model}, split.valid, counts)
        run["calibrated"], shown[f"calibrated, seed {seed}"] = figures(calibrated, split)
        run |= {"seed": seed, "training_time_s": training_time_s, "calibration": asdict(calibrated.calibration)}
        runs.append(run)
    facts = {
        "data": {"users": dataset.num_users, "items": dataset.num_items, "events": len(dataset.item_index)},
        "protocol": f"{split.rule}; full ranking, history items not filtered, ties against the target",
        "split_hash": split.hash,
        "config": config.model_dump(mode="json"),
        "baselines": systems,
        config.kind: {"valid": spread(runs, "valid"), "test": spread(runs, "test"), "runs": runs},
    }
    record(arguments.out, facts)
    print(table(shown, _COLUMNS))


if __name__ == "__main__":
    main()
