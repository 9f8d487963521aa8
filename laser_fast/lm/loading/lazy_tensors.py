"""Tensors of safetensors files, read one at a time when they are asked for.

transformers maps all files of a checkpoint until it has loaded, so every page it touched stays in resident memory: in
the end the whole unpacked checkpoint beside the packed model.
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
    """One tensor of a file in the form that transformers takes: indexing reads it."""

    file: Path
    name: str
    stored: str  # its dtype, in the names of safetensors ("BF16")
    shape: list[int]
    # read into memory of its own, in this dtype if that adds precision; None: another device copies it out of the file
    wanted: torch.dtype | None

    def __getitem__(self, index: Any) -> Tensor:
        """Read this part; the file stays mapped only while what was read is needed."""
        with safe_open(self.file, framework="pt") as opened:
            part: Tensor = opened.get_slice(self.name)[index]
        if self.wanted is None:
            return part
        wider = part.is_floating_point() and self.wanted.itemsize > part.dtype.itemsize
        _give_back_freed()  # by the previous tensor
        return part.to(self.wanted if wider else part.dtype, copy=True)

    def get_dtype(self) -> str:
        """Its dtype as the file names it."""
        return self.stored

    def get_shape(self) -> list[int]:
        """Its sizes."""
        return self.shape


def lazy_tensors(folder: Path, wanted: torch.dtype | None, skip: tuple[str, ...]) -> dict[str, LazyTensor] | None:
    """The tensors of the checkpoint in `folder` by name, none read yet; None if it is not in safetensors.

    Args:
        wanted: as in `LazyTensor`.
        skip: names that begin so are left out.
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
    """Raise a ValueError that names a safetensors file which is not whole, as far as headers tell."""
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
    """Hand freed memory back to the system, where the C library is glibc.

    Its heap keeps what was freed between the packed weights. Quantising a layer on a CPU takes several times the layer,
    which would add up to the unpacked model again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
