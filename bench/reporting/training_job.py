"""Prepares MovieLens-100K, trains SASRec and Laser and ranks the test users: a process of its own for the report.

    python -m reporting.training_job '{"extent": "reduced", "folder": "runs/report", "device": "cpu"}'

Prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from laser_fast.config import LaserConfig, RecommenderConfig, build_config, load_config, resolve_path
from laser_fast.data import PrepareRequest, SequenceDataset, leave_one_out, prepare
from laser_fast.evaluation import RankingMetrics, evaluate
from laser_fast.training.laser import train_laser
from laser_fast.training.recommender import train_recommender

_LOG = "package:recbole/dataset_example/ml-100k"
_PRESET = Path(__file__).resolve().parents[2] / "laser_fast" / "presets" / "movielens-100k.yaml"
_METRICS = ("HR@10", "NDCG@10")
_REDUCED_USERS = 80
_REDUCED = (
    "training.pretrain.epochs=0",
    "training.phase_a.epochs=1",
    "training.phase_a.rows_per_epoch=128",
    "training.phase_b.epochs=0",
)


def reduced_log(folder: Path) -> Path:
    """A copy of the log with the events of its first users alone."""
    source, target = resolve_path(_LOG), folder / "ml-100k"
    target.mkdir(parents=True)
    (target / "ml-100k.item").write_bytes((source / "ml-100k.item").read_bytes())
    lines = (source / "ml-100k.inter").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines[1:] if int(line.split("\t", 1)[0]) <= _REDUCED_USERS]
    (target / "ml-100k.inter").write_text("\n".join([lines[0], *kept]) + "\n", encoding="utf-8")
    return target


def main(order: dict[str, str]) -> dict[str, Any]:
    """Carry out the order of the section."""
    folder, reduced = Path(order["folder"]), order["extent"] == "reduced"
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start = perf_counter()
        yield
        seconds[part] = perf_counter() - start

    with timed("prepare the data"):
        source = reduced_log(folder) if reduced else resolve_path(_LOG)
        prepare(PrepareRequest(out=folder / "data", recbole=source))
        dataset = SequenceDataset.load(folder / "data")
        split = leave_one_out(dataset)
    with timed("train SASRec"):
        small: dict[str, Any] = {"epochs": 3, "width": 32, "folds": 2} if reduced else {}
        sasrec = train_recommender(
            split,
            dataset.num_items,
            build_config(RecommenderConfig, small),
            seed=0,
            item_map_hash=dataset.items.hash(),
            run_dir=folder / "sasrec",
            progress=False,
            device=order["device"],
        )
    with timed("train Laser"):
        places = [f"data={folder / 'data'}", f"recommender={folder / 'sasrec'}", f"output={folder / 'laser'}"]
        config = load_config(LaserConfig, _PRESET, [*places, *(_REDUCED if reduced else ())])
        model, _ = train_laser(config, progress=False)
    with timed("rank the test users"):
        systems = {"SASRec": evaluate(sasrec, split.test, device=order["device"])}
        size = config.evaluation.batch_size
        systems["Laser, cosine only"] = evaluate(model, split.test, batch_size=size, device=order["device"])
        if model.calibration is not None:
            systems["Laser"] = evaluate(model.calibration, split.test, batch_size=size, device=order["device"])
    return {
        "users": dataset.num_users,
        "items": dataset.num_items,
        "events": len(dataset.item_index),
        "test_rows": len(split.test),
        "seconds_by_part": seconds,
        "systems": {name: figures(metrics) for name, metrics in systems.items()},
    }


def figures(metrics: RankingMetrics) -> dict[str, dict[str, float]]:
    """Mean and interval of the metrics that are shown."""
    return {name: {"mean": metrics[name].mean, "ci95": metrics[name].ci95} for name in _METRICS}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr), Path(os.devnull).open("w", encoding="utf-8"):
        result = main(json.loads(sys.argv[1]))
    print(json.dumps(result))
