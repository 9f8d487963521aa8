"""The folder of a run: effective configuration, environment, metrics as they come, checkpoints whole or absent."""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from laser_fast.config import Settings, build_config, dump_config
from laser_fast.data.folders import PART, replace_file, write_json
from laser_fast.training.tensorboard_log import TensorBoardLog
from laser_fast.yaml_text import read_yaml

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

# settings under which a run may go on differently than it began: they change where and how often it is written
_FREE_SETTINGS = ("output", "training.save_steps", "training.tensorboard")


class RunDirectory:
    """Creates the folder and records what makes the run reproducible, or opens it again.

    Args:
        resume: go on with a run that this class began before.
        writes: whether this process writes; where several train only one does, for the others this is a view that
            checks and changes nothing.

    Attributes:
        curves: shows the log in TensorBoard; None = nothing does.

    Raises:
        FileExistsError: the folder exists and is not empty; runs are never overwritten.
        FileNotFoundError: with `resume`, no run was begun there.
        ValueError: with `resume`, the run was begun under another configuration; lists the differences.
    """

    def __init__(self, path: str | Path, config: Settings, *, resume: bool = False, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self.curves: TensorBoardLog | None = None
        if not writes:
            return
        if resume:
            self._refuse_another(config)
        elif self.path.exists() and (not self.path.is_dir() or any(f.suffix != PART for f in self.path.iterdir())):
            raise FileExistsError(
                f"RunDirectory: output must be a new or empty folder, got {str(path)!r}; remove it or choose another"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            replace_file(self.path / "config.yaml", dump_config(config).encode())
        if not (self.path / "environment.json").exists():
            write_json(self.path / "environment.json", describe_environment())

    def _refuse_another(self, config: Settings) -> None:
        file = self.path / "config.yaml"
        if not file.is_file():
            raise FileNotFoundError(
                f"RunDirectory: output must hold the run to resume, got {str(self.path)!r} without a config.yaml; "
                "start it without --resume"
            )
        began = dict(_settings(build_config(type(config), read_yaml(file)).model_dump()))
        now = dict(_settings(config.model_dump()))
        differences = [
            f"{key} = {now.get(key)!r} instead of {began.get(key)!r}"
            for key in sorted(began.keys() | now.keys())
            if began.get(key) != now.get(key) and key not in _FREE_SETTINGS
        ]
        if differences:
            raise ValueError(
                "RunDirectory: a run must be resumed with the configuration it began with, got "
                + ", ".join(differences)
            )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let no other process train here meanwhile. The system gives the folder free when this process ends.

        Raises:
            ValueError: another process trains here.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"RunDirectory: output must be used by one run at a time, got {str(self.path)!r}, in which another "
                    "process trains; wait for it or stop it"
                ) from None
            except OSError as error:  # some network file systems lock no folders
                warnings.warn(
                    f"RunDirectory: the file system should lock {str(self.path)!r} against a second run, got {error}; "
                    "start none meanwhile",
                    stacklevel=3,
                )
            yield
        finally:
            os.close(descriptor)

    @property
    def checkpoint(self) -> Path:
        """The best model so far."""
        return self.path / "checkpoint"

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self.curves is not None:
            self.curves.follow(self.read_log())

    def read_log(self) -> bytes:
        """metrics.jsonl as it is; empty before the first line."""
        file = self.path / "metrics.jsonl"
        return file.read_bytes() if file.exists() else b""

    def write_log(self, content: bytes) -> None:
        """Replace metrics.jsonl."""
        replace_file(self.path / "metrics.jsonl", content)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "finished.json").is_file()

    def finish(self) -> None:
        """Record that the run came to its end."""
        if not self.writes:
            return
        if self.curves is not None:
            self.curves.close()
        write_json(self.path / "finished.json", {"date": _now()})

    def remove_leftovers(self) -> None:
        """Delete what a process that was killed had begun to write; for a run that no process works on."""
        for pattern in (".*.partial", f".*{PART}", ".checkpoint.*.old"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as `section.key` and value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


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
        "date": _now(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions,
        "commit": _commit(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


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
