"""The states from which a run goes on: safetensors and JSON, whole or refused, the last two kept.

states/000012-phase_a-1-40      the state after step 40 of the second epoch of phase A
    tensors.safetensors         parameters, moments of the optimizer, random generators, item matrix, sums of the epoch
    values.json                 everything else: position, schedule, early stopping, budget
    metrics.jsonl, best/        the log and the best checkpoint as they were (hard links take no room)
    state.json                  the format of all these
    seal.json                   SHA-256 of every file beside it, written last
"""

import json
import os
import re
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from laser_fast.files.atomic import remove, replace_directory, replace_file, whole_directory, write_json
from laser_fast.files.descriptions import Description, parse_description
from laser_fast.files.sealed import SealedFolder, seal
from laser_fast.files.tensors import read_tensors

_FORMAT = 2
_STATE = re.compile("[0-9]+-")  # how a name begins
_KEPT = 2  # states; should the newest be damaged, the one before it serves


@dataclass
class State:
    """Tensors and plain values (what JSON takes), by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def join(cls, **parts: "State") -> "State":
        """One state of several; `part` takes it apart again."""
        tensors = {f"{part}/{name}": value for part, state in parts.items() for name, value in state.tensors.items()}
        return cls(tensors, {part: state.values for part, state in parts.items()})

    def part(self, name: str) -> "State":
        """What was joined under this name."""
        prefix = f"{name}/"
        tensors = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        return State(tensors, self.values[name])


class StateFolder:
    """The folder `states` of a run; without `writes`, nothing changes it."""

    def __init__(self, run: Path, *, writes: bool = True) -> None:
        self.path = run / "states"
        self._log = run / "metrics.jsonl"
        self._checkpoint = run / "checkpoint"
        self._writes = writes
        self._kept: list[Path] = []  # known to be whole, the newest last
        self._count = max((_number(folder) for folder in self._folders()), default=0)

    def save(self, state: State) -> None:
        """Keep a state and the best checkpoint so far, then delete all states but this one and the one before it.

        Its part `position` has the `stage`, `epoch` and `step`, and how many `log_bytes` of the log belong to it.
        """
        if not self._writes:
            return
        self._count += 1
        position = state.values["position"]
        target = self.path / f"{self._count:06d}-{position['stage']}-{position['epoch']}-{position['step']}"
        if self.path.is_symlink():
            remove(self.path)
        with replace_directory(target) as fresh:
            # copies: no two may share storage, as the tables of 8-bit Adam do
            tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.tensors.items()}
            save_file(tensors, fresh / "tensors.safetensors")
            write_json(fresh / "values.json", state.values)
            log = self._log.read_bytes()[: position["log_bytes"]] if self._log.exists() else b""
            (fresh / "metrics.jsonl").write_bytes(log)
            with suppress(FileNotFoundError):  # there is none before the end of stage 1
                _link_files(whole_directory(self._checkpoint), fresh / "best")
            write_json(fresh / "state.json", {"format": _FORMAT})
            seal(fresh)
        self._kept = [*self._kept, target][-_KEPT:]
        for entry in self.path.iterdir():
            if entry not in self._kept:
                remove(entry)

    def newest(self) -> State | None:
        """The newest whole state, None where none was completed; a warning names damaged ones after it."""
        damaged: list[str] = []
        for folder in reversed(self._folders()):
            try:
                state = _read(folder)
            except (OSError, ValueError) as error:
                damaged.append(f"{folder.name} ({error})")
                continue
            if damaged:
                warnings.warn(
                    f"StateFolder: a state must be whole, got {'; '.join(damaged)}; {folder.name} is used, "
                    "the last good one",
                    stacklevel=2,
                )
            self._kept = [folder]
            return state
        if damaged:
            raise ValueError(
                f"StateFolder: a state must be whole, got {'; '.join(damaged)}, and there is no other; "
                "start again in a new output"
            )
        return None

    def put_back_files(self) -> None:
        """Make log and best checkpoint what they were at the state of `newest`, or remove them if there is none."""
        if not self._writes:
            return
        folder = self._kept[-1] if self._kept else None
        replace_file(self._log, (folder / "metrics.jsonl").read_bytes() if folder else b"")
        if folder and (folder / "best").is_dir():
            with replace_directory(self._checkpoint) as fresh:
                _link_files(folder / "best", fresh)
        else:
            remove(self._checkpoint)

    def clear(self) -> None:
        """Delete all states."""
        if self._writes:
            remove(self.path)
            self._kept = []

    def _folders(self) -> list[Path]:
        """Completed states, the oldest first."""
        if not self.path.is_dir():
            return []
        return sorted((entry for entry in self.path.iterdir() if _STATE.match(entry.name)), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.partition("-")[0])


class _StateDescription(Description):
    format: int


def _read(folder: Path) -> State:
    """A state, if every file is the one that was written; else OSError or ValueError."""
    sealed = SealedFolder(folder)
    sealed.compare_all()
    content = sealed.read("state.json")
    parse_description(_StateDescription, content, "newest: state.json", version=("format", _FORMAT))
    return State(read_tensors(sealed, "tensors.safetensors"), json.loads(sealed.read("values.json")))


def _link_files(source: Path, target: Path) -> None:
    """The files of a folder under another one: hard links where the file system has them, else copies."""
    target.mkdir(exist_ok=True)
    for path in filter(Path.is_file, source.iterdir()):
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)
