"""Tensors of safetensors files that are read when they are asked for, one at a time.

transformers maps all files of a checkpoint for as long as it loads, so every page it has touched stays in the resident
memory of the process: in the end the whole unpacked checkpoint, beside the packed model.
"""

import ctypes
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from laser_fast.files.tensors import open_tensors

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a file, in the form in which transformers takes it: indexing reads it.

    With a dtype that is `wanted` on the CPU it is read into memory of its own, in that dtype if this adds precision;
    None: it goes to another device, which copies it out of the mapped file.
    """

    file: Path
    name: str
    stored: str  # its dtype, in the names of safetensors ("BF16")
    shape: list[int]
    wanted: torch.dtype | None

    def __getitem__(self, index: Any) -> Tensor:
        """Read this part of it; the file stays mapped no longer than what was read is needed."""
        with safe_open(self.file, framework="pt") as opened:
            part: Tensor = opened.get_slice(self.name)[index]
        if self.wanted is None:
            return part
        wider = part.is_floating_point() and self.wanted.itemsize > part.dtype.itemsize
        _give_back_freed()  # by the tensor before this one
        return part.to(self.wanted if wider else part.dtype, copy=True)

    def get_dtype(self) -> str:
        """As `stored`."""
        return self.stored

    def get_shape(self) -> list[int]:
        """As `shape`."""
        return self.shape


def lazy_tensors(folder: Path, wanted: torch.dtype | None, skip: tuple[str, ...]) -> dict[str, LazyTensor] | None:
    """Every tensor of the checkpoint in `folder` by name, none of them read; None if it is not in safetensors.

    Args:
        wanted: as in `LazyTensor`.
        skip: beginnings of the names that are left out.

    Raises:
        FileNotFoundError: the index names a file that is not there.
    """
    files = [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        files = _indexed(folder)
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"lazy_tensors: {folder.name} must hold the files of its index, got no {missing}")
    elif not files[0].is_file():
        return None
    found: dict[str, LazyTensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                if not name.startswith(skip):
                    part = opened.get_slice(name)
                    found[name] = LazyTensor(file, name, part.get_dtype(), part.get_shape(), wanted)
    return found


def refuse_damaged_weights(folder: Path) -> None:
    """Make sure that the files of a checkpoint in safetensors are whole, as far as their headers tell.

    Raises:
        ValueError: one is not; names it.
    """
    for file in [folder / _SINGLE, *(_indexed(folder) if (folder / _INDEX).is_file() else [])]:
        if file.is_file():
            with open_tensors(file, "load_language_model"):
                pass


def _indexed(folder: Path) -> list[Path]:
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"load_language_model: {_INDEX} must name the file of every tensor, got {reason}") from error


def _give_back_freed() -> None:
    """Hand memory that was freed back to the system, where the C library is glibc.

    Its heap keeps what was freed between the packed weights, and quantising a layer on a CPU takes several times the
    layer: without this those add up to the unpacked model again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
