"""What serves an operation on a device, and why: the compiled library of csrc/, a Triton kernel or the torch reference.

Library and kernels are looked for at the first call that wants them, never at import.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parents[1] / "_native"
_LIBRARY = "laser_fast_native.so"
NATIVE_REMEDY = (
    "install a C++ compiler (and nvcc for CUDA), then reinstall laser-fast; `pip install -v` shows the build"
)
TRITON_REMEDY = "pip install triton"
MAX_EXPERTS = 256  # a tile of the Triton kernels holds all experts; more run as the torch reference
_OLDEST = (8, 0)  # bfloat16 and TF32 products


@dataclass(frozen=True)
class NativeLibrary:
    """The compiled library, or why there is none.

    Attributes:
        level: what it was built for, "cuda" or "cpu"; "none" where it could not be loaded.
        reason: why not for more; empty for "cuda".
        module: the loaded tvm_ffi module, None for level "none".
    """

    level: str
    reason: str
    module: Any

    def function(self, name: str) -> Callable[..., Any] | None:
        """The exported function of that name, or None."""
        known = self.module is not None and self.module.implements_function(name)
        return self.module.get_function(name) if known else None


def load_native_from(folder: Path) -> NativeLibrary:
    """Load the library in `folder`; warns of one that cannot be loaded, and never raises."""
    facts: dict[str, str] = {}
    if (folder / "build.json").is_file():
        facts = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    library = folder / _LIBRARY
    if not library.is_file():
        return NativeLibrary("none", facts.get("reason") or "laser-fast was not installed with pip", None)
    try:
        import tvm_ffi

        module = tvm_ffi.load_module(str(library))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        versions = f"built with apache-tvm-ffi {facts.get('apache-tvm-ffi', 'unknown')}, found {_installed_version()}"
        reason = f"{library.name} does not load ({versions}): {error}"
        warnings.warn(
            f"laser_fast: {reason}; the torch reference runs instead; {NATIVE_REMEDY}", RuntimeWarning, stacklevel=2
        )
        return NativeLibrary("none", reason, None)
    return NativeLibrary(facts.get("level", "cpu"), facts.get("reason", ""), module)


def _installed_version() -> str:
    try:
        return metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError:
        return "none (apache-tvm-ffi is not installed)"


@cache
def load_native() -> NativeLibrary:
    """The library of this installation, loaded once per process."""
    return load_native_from(_FOLDER)


@cache
def cuda_absence(device_index: int) -> str:
    """Empty where the compiled CUDA code runs on that device, else the reason; probed once per device and process."""
    library = load_native()
    probe = library.function("probe_cuda")
    if probe is None:
        return library.reason or "the library was built without CUDA"
    return str(probe(device_index))


def compiled_operation(operation: str, device: torch.device) -> Callable[..., Any] | None:
    """The compiled code of an operation on a device, or None where its reference runs; on a GPU with a warning."""
    if device.type not in ("cpu", "cuda"):
        return None
    if device.type == "cpu":
        found = load_native().function(f"{operation}_cpu")
        # the CPU code takes no more threads than torch itself would
        return None if found is None else lambda *arguments: found(*arguments, torch.get_num_threads())
    absence = cuda_absence(device.index)
    on_gpu = None if absence else load_native().function(f"{operation}_cuda")
    if on_gpu is None:
        warn_fallback(operation, absence or "the library was built from another version of the sources")
    return on_gpu


@cache
def warn_fallback(operation: str, reason: str, remedy: str = NATIVE_REMEDY) -> None:
    """Warn once per process that an operation runs as its torch reference on a GPU, why, and what to do."""
    message = f"{operation}: the torch reference runs in place of the compiled kernel: {reason}"
    warnings.warn(f"{message}; {remedy}; `laser-fast doctor` lists what runs", RuntimeWarning, stacklevel=4)


@cache
def triton_absence(device_index: int) -> str:
    """Empty where Triton kernels run on that CUDA device, else the reason; looked up once per device and process."""
    try:
        found = importlib.util.find_spec("triton")
    except ValueError:  # sys.modules holds something that is no module
        found = None
    if found is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < _OLDEST:
        return f"the device is sm_{capability[0]}{capability[1]}, the kernels need sm_80 or newer"
    return ""


def triton_serves(operation: str, *tensors: Tensor, num_experts: int = 1) -> bool:
    """Whether the Triton kernel takes these tensors; warns once where it cannot run on their CUDA device.

    The torch reference keeps float64, which only tests of gradients use, and more than MAX_EXPERTS experts.
    """
    if tensors[0].device.type != "cuda":
        return False
    if num_experts > MAX_EXPERTS or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    absence = triton_absence(tensors[0].device.index)
    if absence:
        warn_fallback(operation, absence, TRITON_REMEDY)
    return not absence
