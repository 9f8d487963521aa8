"""Safetensors files: written, read, or their headers alone read; errors name the file."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from laser_fast.files.sealed import SealedFolder

Shape = tuple[int, ...]


@contextmanager
def open_tensors(path: Path, function: str) -> Iterator[Any]:
    """`safe_open` of a file; raises ValueError, begun by `function`, if it is damaged or lacks what is asked of it."""
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{function}: {path.name} must be a whole safetensors file, got {reason}") from error


def read_tensors(sealed: SealedFolder, name: str, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file of a sealed folder, on the CPU, by name.

    Args:
        only: names to read; one that the file does not have is left out.

    Raises:
        ValueError: the file is missing, damaged or no safetensors file, or a number is NaN or infinite.
    """
    with open_tensors(sealed.file(name), "read_tensors") as opened:
        names = [key for key in opened.keys() if only is None or key in only]  # noqa: SIM118 - not a dictionary
        # copies begin where torch's own tensors do, on which sums depend in their last bit; in a file it is anywhere
        tensors = {key: opened.get_tensor(key).clone() for key in names}
    _refuse_not_finite(tensors, f"read_tensors: {name}")
    return tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any device and strides for `read_tensors`; raises ValueError for NaN or infinity."""
    prepared = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _refuse_not_finite(prepared, f"write_tensors: {path.name}")
    save_file(prepared, path)


def load_weights_of_file(module: nn.Module, tensors: Mapping[str, Tensor], where: str, *, strict: bool = True) -> None:
    """`load_state_dict`, which would take whole numbers for weights as well.

    Args:
        where: begins the message: the function, a colon, and the name of the file.

    Raises:
        ValueError: the weights of the module are floating point and those of the file are not.
        RuntimeError: see `load_state_dict`.
    """
    for name, known in module.state_dict().items():
        if name in tensors and known.is_floating_point() and not tensors[name].is_floating_point():
            raise ValueError(f"{where} must hold {name} in floating point, got {tensors[name].dtype}")
    module.load_state_dict(tensors, strict=strict)


def _refuse_not_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            least, largest = tensor.aminmax()  # makes nothing of the size of a catalogue
            if not (least.isfinite() and largest.isfinite()):
                raise ValueError(f"{where} must hold finite numbers, got {least.item()} to {largest.item()} in {name}")


def tensor_shapes(sealed: SealedFolder, name: str) -> dict[str, Shape]:
    """The shapes of the tensors of such a file by name, from its header; errors as of `read_tensors`."""
    with open_tensors(sealed.file(name), "tensor_shapes") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - see above


def refuse_other_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> None:
    """Refuse a file that lacks a tensor or has it in another shape, before anything of these sizes is built.

    Args:
        where: begins the message: the function, a colon, and the name of the file.
    """
    for name, shape in wanted.items():
        if found.get(name) != shape:
            got = "none" if name not in found else f"shape {found[name]}"
            raise ValueError(f"{where} must hold {name} of shape {shape}, as its description says, got {got}")
