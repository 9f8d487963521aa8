"""HitRatio@1 among 20 candidates (LLaRA's protocol) of SASRec on data that came split, with several seeds.

    laser-fast prepare runs/lastfm --presplit ../shared/data/lastfm
    python bench/accuracy_candidates.py --data runs/lastfm --seeds 3 --out bench/results/cpu/llara-lastfm.json

The validation rows choose the settings and the epoch, and the figures are of the same rows where the source has no test
rows: they flatter. With `OMP_NUM_THREADS=1` the figures are those of one thread.
"""

import time
from typing import Any

from recording import parser_of, record

from laser_fast.config import RecommenderConfig, build_config
from laser_fast.config.settings import apply_overrides
from laser_fast.data import SequenceDataset, make_split
from laser_fast.evaluation import (
    RankingMetrics,
    across_seeds,
    evaluate,
    evaluate_candidates,
    llara_candidates,
    table,
)
from laser_fast.recommenders import Popularity
from laser_fast.training.recommender.train_recommender import train_recommender


def main() -> None:
    """Train, rank, print a table, write JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", required=True, help="folder written by `laser-fast prepare --presplit`")
    parser.add_argument("--part", choices=("valid", "test"), default="valid")
    parser.add_argument("--seeds", type=int, default=3, help="SASRec is trained with seeds 0..SEEDS-1")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of SASRec")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    dataset = SequenceDataset.load(arguments.data)
    split = make_split(dataset, "given")
    rows = split.valid if arguments.part == "valid" else split.test
    config = build_config(RecommenderConfig, apply_overrides({}, arguments.set))
    candidates = llara_candidates(rows, dataset.num_items, draws=arguments.draws)
    popularity = Popularity.fit(split.train.items, split.train.cu_seqlens, dataset.num_items)
    measured: dict[str, RankingMetrics] = {"Popularity": evaluate_candidates(popularity, rows, candidates)}
    runs: list[dict[str, Any]] = []
    full = []
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        model = train_recommender(split, dataset.num_items, config, seed=seed, progress=False)
        time_s = time.perf_counter() - start
        measured[f"SASRec, seed {seed}"] = sampled = evaluate_candidates(model, rows, candidates)
        print(f"seed {seed}: HR@1|sampled20 {sampled['HR@1|sampled20']}, {time_s:.0f} s", flush=True)
        full.append(evaluate(model, rows))
        runs.append({"seed": seed, "time_s": time_s, "sampled": sampled.to_dict(), "full": full[-1].to_dict()})
    spreads = across_seeds([measured[f"SASRec, seed {run['seed']}"] for run in runs]) | across_seeds(full)
    print(table(measured, ("HR@1|sampled20", "MRR|sampled20")))
    print(table({"SASRec": spreads}, ("HR@1|sampled20", "HR@10", "NDCG@10")))
    facts = {
        "protocol": f"{split.rule}; {arguments.part} rows, target and 19 uniform items outside the shown history, "
        f"{arguments.draws} draws of seed 0, ties against the target; the epoch was chosen on the validation rows",
        "split": {"hash": split.hash, **split.counts()},
        "config": config.model_dump(mode="json"),
        "popularity": measured["Popularity"].to_dict(),
        "sasrec": {"spread": {name: value.to_dict() for name, value in spreads.items()}, "runs": runs},
    }
    record(arguments.out, facts)


if __name__ == "__main__":
    main()
