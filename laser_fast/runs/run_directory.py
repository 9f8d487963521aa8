"""The folder of a run: effective configuration, environment, metrics as they come, checkpoints whole or absent."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from laser_fast.config import Settings, build_config, dump_config
from laser_fast.config.yaml_text import read_yaml
from laser_fast.files.disk import append_line, make_directory
from laser_fast.files.folders import is_leftover, remove, remove_leftovers, replace_file, replace_json
from laser_fast.runs.tensorboard_log import TensorBoardLog

_PACKAGES: tuple[str, ...] = (
    "laser-fast",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "triton",
)
_PACKAGES += ("bitsandbytes",)

# settings under which a run may go on differently than it began: they change where and how often it is written
_FREE_SETTINGS = ("output", "training.save_steps", "training.tensorboard")

# what a run writes; a folder with no more than the traces, the first among them, holds nothing that could be lost
_TRACES = ("environment.json", "config.yaml", "metrics.jsonl", "tensorboard")
_NAMES = (*_TRACES, "states", "checkpoint", "finished.json")


class RunDirectory:
    """Creates the folder and records what makes the run reproducible, or opens it again.

    For whoever has claimed the folder (`claim`). The folder itself may be a link; nothing that a run writes in it may.

    Args:
        resume: go on with a run that this class began before.
        writes: whether this process writes; else this is a view that changes nothing.

    Attributes:
        curves: shows the log in TensorBoard; None = nothing does.

    Raises:
        FileExistsError: something lies there, see `refuse_used`; or, where a run writes, a link.
        FileNotFoundError: with `resume`, no run was begun there.
        ValueError: with `resume`, the run was begun under another configuration; lists the differences.
    """

    def __init__(self, path: str | Path, config: Settings, *, resume: bool = False, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self.curves: TensorBoardLog | None = None
        killed_at_once = self.path.is_dir() and _names_in(self.path) <= {_TRACES[0]}
        if resume and not killed_at_once:
            self._refuse_another(config)
        elif writes:
            self.refuse_used(self.path)
            self._begin(config)

    @staticmethod
    def refuse_used(path: str | Path) -> None:
        """Refuse a folder that is not empty and holds more than a run left that ended before its first state.

        Raises:
            FileExistsError: it does.
        """
        folder = Path(path)
        what, remedy = "which holds something else", "choose another"
        if not folder.exists():
            return
        if not folder.is_dir():
            what = "which is a file"
        else:
            names, states = _names_in(folder), folder / "states"
            if states.is_dir() and not states.is_symlink() and not any(states.glob("[0-9]*")):
                names.discard("states")
            if not names or (_TRACES[0] in names and names <= set(_TRACES) and not _links_in(folder)):
                return
        if (folder / "config.yaml").is_file():
            what, remedy = "where a run was begun", "go on with it (--resume), or choose another"
        raise FileExistsError(
            f"RunDirectory: output must be a new or empty folder, got {str(path)!r}, {what}; {remedy}"
        )

    def _begin(self, config: Settings) -> None:
        make_directory(self.path.resolve())  # a link may point to a folder that is still to be made
        self.remove_leftovers()
        for name in (*_TRACES[1:], "states"):
            remove(self.path / name)
        replace_json(self.path / _TRACES[0], describe_environment())
        replace_file(self.path / "config.yaml", dump_config(config).encode())  # the last: now there is a run to resume

    def _refuse_another(self, config: Settings) -> None:
        file = self.path / "config.yaml"
        if not file.is_file():
            raise FileNotFoundError(
                f"RunDirectory: output must hold the run to resume, got {str(self.path)!r} without a config.yaml; "
                "start it without --resume"
            )
        if links := _links_in(self.path):
            raise FileExistsError(
                f"RunDirectory: what a run writes must not lie behind a link, got the link {links[0]!r} in "
                f"{str(self.path)!r}; put the file or folder itself there, or make the whole output a link"
            )
        began = dict(_settings(build_config(type(config), read_yaml(file), str(file)).model_dump()))
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

    @property
    def checkpoint(self) -> Path:
        """The best model so far."""
        return self.path / "checkpoint"

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        if not self.writes:
            return
        append_line(self.path / "metrics.jsonl", json.dumps(values).encode())
        if self.curves is not None:
            self.curves.follow(self.read_log())

    def read_log(self) -> bytes:
        """The lines of metrics.jsonl; one that a process was killed in is none yet."""
        file = self.path / "metrics.jsonl"
        content = file.read_bytes() if file.exists() else b""
        return content[: content.rfind(b"\n") + 1]

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
        replace_json(self.path / "finished.json", {"date": _now()})

    def remove_leftovers(self) -> None:
        """Delete what a process that was killed had begun to write; for a run that no process works on."""
        for name in _NAMES:
            remove_leftovers(self.path / name)


def _names_in(folder: Path) -> set[str]:
    """What is in a folder beside what killed processes left there."""
    return {entry.name for entry in folder.iterdir() if not is_leftover(entry)}


def _links_in(folder: Path) -> list[str]:
    """Names of a run under which there is a link."""
    return [name for name in _NAMES if (folder / name).is_symlink()]


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
