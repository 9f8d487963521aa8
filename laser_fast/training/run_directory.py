"""The folder of a run: effective configuration, environment, metrics as they come, checkpoints whole or absent."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from laser_fast.config import Settings, dump_config

_PACKAGES = (
    "laser-fast",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "triton",
    "bitsandbytes",
)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write beside and rename, so that the file is never half-written."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


class RunDirectory:
    """Creates the folder and records what makes the run reproducible.

    Raises:
        FileExistsError: the folder exists and is not empty; runs are never overwritten.
    """

    def __init__(self, path: str | Path, config: Settings) -> None:
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(
                f"RunDirectory: output must be a new or empty folder, got {str(path)!r}; remove it or choose another"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        write_json(self.path / "environment.json", describe_environment())

    @property
    def checkpoint(self) -> Path:
        """The best model so far."""
        return self.path / "checkpoint"

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def describe_environment() -> dict[str, Any]:
    """Versions, processor and commit: what a figure needs beside it. No host name, no path."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions,
        "commit": _commit(),
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux; the generic name follows
    return platform.processor()


def _commit() -> str | None:
    """Commit of the clone this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None
