"""What a report is about: the files of a run, and the model that was kept with the data it was built on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from laser_fast.config.yaml_text import read_yaml
from laser_fast.data import SequenceDataset, Split
from laser_fast.files.descriptions import parse_description
from laser_fast.laser.laser_files import find_saved
from laser_fast.laser.model import LaserModel
from laser_fast.recommenders.protocol import Scorer

_STAGES = {
    "text": ("T", "the text stage"),
    "pretrain": ("P", "stage 1"),
    "phase_a": ("A", "phase A"),
    "phase_b": ("B", "phase B"),
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded run.

    Attributes:
        model: in evaluation mode, with its item matrix and, where the run has one, its calibration.
        counts: int64 [I], events of each item in the training part.
        recommender: the ID-based recommender, if any.
        tables: what was counted in the training part, see `compare`.
        batch_size: rows scored at a time.
    """

    model: LaserModel
    dataset: SequenceDataset
    split: Split
    counts: Tensor
    recommender: Scorer | None
    tables: Mapping[str, Scorer]
    batch_size: int = 128

    @property
    def scorer(self) -> Scorer:
        """What recommends: the calibrated score where there is one."""
        return self.model if self.model.calibration is None else self.model.calibration


@dataclass(frozen=True)
class Epoch:
    """One line of the log; `number` 0 is the model before its first step."""

    stage: str
    number: int
    values: Mapping[str, Any]

    @property
    def short(self) -> str:
        """As an axis shows it: T1, P1, A0, A1, B1."""
        return f"{_STAGES.get(self.stage, (self.stage, ''))[0]}{self.number}"


@dataclass(frozen=True)
class RunRecord:
    """A run directory, read without its model.

    Attributes:
        config_text: config.yaml as it is.
        environment: environment.json; empty where it is missing.
        epochs: lines of the log that belong to an epoch, in order.
        shortages: times that memory ran out.
        finished: date of the end; None for a run that did not come to it.
        kept: stage, epoch and validation of the checkpoint; None before the first.
    """

    name: str
    config: Mapping[str, Any]
    config_text: str
    environment: Mapping[str, Any]
    epochs: tuple[Epoch, ...]
    shortages: int
    finished: str | None
    kept: Mapping[str, Any] | None

    def of_stage(self, stage: str) -> list[Epoch]:
        """The epochs of "text", "pretrain", "phase_a" or "phase_b"."""
        return [epoch for epoch in self.epochs if epoch.stage == stage]

    @property
    def prefix(self) -> str:
        """What writes the prefix (`bituning.prefix`)."""
        return str(self.config.get("bituning", {}).get("prefix", "mformer"))

    @property
    def items_are_texts(self) -> bool:
        """Whether item embeddings come from the text residual alone."""
        text = self.config.get("text") or {}
        return bool(text.get("residual")) and text.get("item_side") != "lm"

    def is_kept(self, epoch: Epoch) -> bool:
        """Whether the checkpoint is of this epoch."""
        return self.kept is not None and (epoch.stage, epoch.number - 1) == (self.kept["stage"], self.kept["epoch"])


def stage_name(stage: str) -> str:
    """A stage in words."""
    return _STAGES.get(stage, ("", stage))[1]


def read_run(folder: str | Path) -> RunRecord:
    """Read what `laser-fast train` wrote; the run need not be finished.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a file of it is damaged.
    """
    path = Path(folder)
    config_file = path / "config.yaml"
    config = read_yaml(config_file) if config_file.is_file() else {}
    if not {"lm", "training"} <= set(config):
        raise FileNotFoundError(
            f"read_run: a run of `laser-fast train` must be given, got {str(folder)!r} without the config.yaml of one"
        )
    lines = _read_log(path / "metrics.jsonl")
    finished, saved = _read_json(path / "finished.json"), find_saved(path)
    return RunRecord(
        name=path.resolve().name,
        config=config,
        config_text=config_file.read_text(encoding="utf-8"),
        environment=_read_json(path / "environment.json") or {},
        epochs=tuple(Epoch(line["stage"], line["epoch"] + 1, line) for line in lines if "epoch" in line),
        shortages=sum(line["stage"] == "out_of_memory" for line in lines),
        finished=None if finished is None else finished.get("date", ""),
        kept=None if saved is None else saved.description.facts,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return parse_description(dict[str, Any], path.read_bytes(), f"read_run: {path.name}")


def _read_log(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # not splitlines: JSON may hold Unicode's separators; the last part is empty, or what a killed process had begun
    try:
        read = [json.loads(line) for line in text.split("\n")[:-1]]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"read_run: {path.name} must hold a JSON object a line, got {error}") from error
    for number, line in enumerate(read, start=1):
        if not (isinstance(line, dict) and isinstance(line.get("stage"), str) and type(line.get("epoch", 0)) is int):
            raise ValueError(
                f"read_run: {path.name} must hold a stage, and the number of an epoch if any, in every line, "
                f"got line {number} without"
            )
    return read
