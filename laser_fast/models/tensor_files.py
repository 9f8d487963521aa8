"""Safetensors files: read, or only their headers, with errors that name the file."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from laser_fast.data.sealed import SealedFolder

Shape = tuple[int, ...]


@contextmanager
def open_tensors(path: Path, function: str) -> Iterator[Any]:
    """`safe_open` of a file, whose header is whole and announces as much data as there is.

    Args:
        function: the first word of a message.

    Raises:
        ValueError: what is asked of the file is not in it, or it is damaged or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{function}: {path.name} must be a whole safetensors file, got {reason}") from error


def read_tensors(sealed: SealedFolder, name: str, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file of a sealed folder, on the CPU, by name.

    Args:
        only: read no others; one that the file does not have is left out.

    Raises:
        ValueError: the file is missing, damaged or no safetensors file.
    """
    with open_tensors(sealed.file(name), "read_tensors") as opened:
        names = [key for key in opened.keys() if only is None or key in only]  # noqa: SIM118 - not a dictionary
        # copies begin where torch's own tensors do, on which sums depend in their last bit; in a file it is anywhere
        return {key: opened.get_tensor(key).clone() for key in names}


def tensor_shapes(sealed: SealedFolder, name: str) -> dict[str, Shape]:
    """The shapes of the tensors of such a file by name, from its header; errors as of `read_tensors`."""
    with open_tensors(sealed.file(name), "tensor_shapes") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - see above


def refuse_other_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> None:
    """Make sure that tensors are there, in these shapes; before anything of these sizes is built.

    Args:
        where: begins the message: the function, a colon, and the name of the file.

    Raises:
        ValueError: one is missing or has another shape.
    """
    for name, shape in wanted.items():
        if found.get(name) != shape:
            got = "none" if name not in found else f"shape {found[name]}"
            raise ValueError(f"{where} must hold {name} of shape {shape}, as its description says, got {got}")
