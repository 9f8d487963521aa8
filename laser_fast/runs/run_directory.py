"""The folder of a run: effective configuration, environment, log, states and the best checkpoint, whole or absent."""

import importlib.metadata
import json
import os
import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from laser_fast.config import Settings, build_config, dump_config
from laser_fast.config.yaml_text import read_yaml
from laser_fast.files.atomic import is_leftover, remove, remove_leftovers, replace_file, replace_json
from laser_fast.files.disk import append_line, make_directory
from laser_fast.files.locks import claim
from laser_fast.runs.resume import State, StateFolder
from laser_fast.runs.tensorboard_log import TensorBoardLog

_PACKAGES = [
    "laser-fast",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "triton",
    "bitsandbytes",
]

# settings that may change when a run goes on: where and how often it is written
_FREE_SETTINGS = ("output", "training.save_steps", "training.tensorboard")

# what a run writes; a folder with no more than the traces, the first among them, holds nothing that could be lost
_TRACES = ("environment.json", "config.yaml", "metrics.jsonl", "tensorboard")
_NAMES = (*_TRACES, "states", "checkpoint", "finished.json")


@contextmanager
def open_run(
    path: str | Path, config: Settings, *, resume: bool = False, writes: bool = True
) -> Iterator["RunDirectory"]:
    """Claim the folder (`claim`) and check it (`RunDirectory`); delete states that a kill left in a finished run."""
    with claim(Path(path).resolve()) if writes else nullcontext():
        run = RunDirectory(path, config, resume=resume, writes=writes)
        if run.finished:
            run.states.clear()
        yield run


class RunDirectory:
    """The folder of a run, which the process must have claimed (`open_run`); nothing is written before `begin`.

    The folder itself may be a link; what a run writes in it may not.

    Args:
        resume: go on with a run that was begun before.
        writes: whether this process writes; without it this is a view that changes nothing.

    Attributes:
        states: from which the run goes on.

    Raises:
        FileExistsError: the folder holds something else; or, where a run writes, a link.
        FileNotFoundError: with `resume`, no run was begun there.
        ValueError: with `resume`, the run was begun under another configuration; lists the differences.
    """

    def __init__(self, path: str | Path, config: Settings, *, resume: bool = False, writes: bool = True) -> None:
        self.path = Path(path)
        self.states = StateFolder(self.path, writes=writes)
        self._config, self._writes = config, writes
        self._curves: TensorBoardLog | None = None
        killed_at_once = self.path.is_dir() and _names_in(self.path) <= {_TRACES[0]}
        self._is_new = not resume or killed_at_once
        if not self._is_new:
            self._refuse_another()
        elif writes:
            self._refuse_used()

    def begin(self, *, tensorboard: bool = False) -> "RunDirectory":
        """Make the folder of a new run and record what makes it reproducible; `tensorboard` shows the log there."""
        if self._writes and self._is_new:
            make_directory(self.path.resolve())  # a link may point to a folder that is still to be made
            self._remove_leftovers()
            for name in (*_TRACES[1:], "states"):
                remove(self.path / name)
            replace_json(self.path / _TRACES[0], describe_environment())
            # the last: now there is a run to resume
            replace_file(self.path / "config.yaml", dump_config(self._config).encode())
        if self._writes and tensorboard:
            self._curves = TensorBoardLog(self.path / "tensorboard")
        return self

    def go_on(
        self, function: str, fingerprint: Mapping[str, Any], wait: Callable[[], None] = lambda: None
    ) -> State | None:
        """The newest whole state, with log and checkpoint put back to what they were then; None if there is none.

        Args:
            function: the first word of messages.
            fingerprint: what the run is trained on, by its name in a message; must be that of the state.
            wait: waits for the other processes, which read the same states.
        """
        with warnings.catch_warnings():
            if not self._writes:  # the process that writes says it
                warnings.simplefilter("ignore")
            state = self.states.newest()
            if state is None:
                warnings.warn(f"{function}: {self.path} has no state yet; it begins anew", stacklevel=4)
        if state is not None:
            refuse_another_beginning(function, state.values["position"]["fingerprint"], fingerprint)
        wait()
        if self._writes:
            self._remove_leftovers()
        self.states.put_back_files()
        wait()
        return state

    @property
    def checkpoint(self) -> Path:
        """The best model so far."""
        return self.path / "checkpoint"

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        if not self._writes:
            return
        append_line(self.path / "metrics.jsonl", json.dumps(values).encode())
        if self._curves is not None:
            self._curves.follow(self.read_log())

    def read_log(self) -> bytes:
        """The whole lines of metrics.jsonl; a process may have been killed in the last one."""
        file = self.path / "metrics.jsonl"
        content = file.read_bytes() if file.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "finished.json").is_file()

    def finish(self) -> None:
        """Record that the run came to its end."""
        if not self._writes:
            return
        if self._curves is not None:
            self._curves.close()
        replace_json(self.path / "finished.json", {"date": _now()})

    def _remove_leftovers(self) -> None:
        """Delete what a killed process had begun to write."""
        for name in _NAMES:
            remove_leftovers(self.path / name)

    def _refuse_used(self) -> None:
        """Refuse a folder that holds more than a run that ended before its first state left."""
        what, remedy = "which holds something else", "choose another"
        if not self.path.exists():
            return
        if not self.path.is_dir():
            what = "which is a file"
        else:
            names, states = _names_in(self.path), self.path / "states"
            if states.is_dir() and not states.is_symlink() and not any(states.glob("[0-9]*")):
                names.discard("states")
            if not names or (_TRACES[0] in names and names <= set(_TRACES) and not _links_in(self.path)):
                return
        if (self.path / "config.yaml").is_file():
            what, remedy = "where a run was begun", "go on with it (--resume), or choose another"
        raise FileExistsError(
            f"RunDirectory: output must be a new or empty folder, got {str(self.path)!r}, {what}; {remedy}"
        )

    def _refuse_another(self) -> None:
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
        began = dict(_settings(build_config(type(self._config), read_yaml(file), str(file)).model_dump()))
        now = dict(_settings(self._config.model_dump()))
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


def refuse_another_beginning(function: str, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError, in the words of `function`, where a run would go on with other things than it began with."""
    if changed := [name for name, value in now.items() if began.get(name) != value]:
        raise ValueError(
            f"{function}: a run must be resumed with what it began with, got another " + " and ".join(changed)
        )


def _names_in(folder: Path) -> set[str]:
    """Entries of a folder, without what killed processes left there."""
    return {entry.name for entry in folder.iterdir() if not is_leftover(entry)}


def _links_in(folder: Path) -> list[str]:
    """Those names that a run writes under which there is a link."""
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
