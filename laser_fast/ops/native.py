"""The compiled library of csrc/: loaded at the first call that wants it, and if it is absent, why."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parents[1] / "_native"
_LIBRARY = "laser_fast_native.so"
REMEDY = "install a C++ compiler (and nvcc for CUDA), then reinstall laser-fast; `pip install -v` shows the build"


@dataclass(frozen=True)
class NativeLibrary:
    """What `load_native` found.

    Attributes:
        level: "cuda", "cpu" or "none" - what the library was built for; "none" where it could not be loaded.
        reason: Why not more than that; empty for "cuda".
        module: The loaded tvm_ffi module, None for level "none".
    """

    level: str
    reason: str
    module: Any

    def function(self, name: str) -> Callable[..., Any] | None:
        """The exported function, or None where this library has none of that name."""
        if self.module is None or not self.module.implements_function(name):
            return None
        found: Callable[..., Any] = self.module.get_function(name)
        return found


def load_native_from(folder: Path) -> NativeLibrary:
    """Load the library in `folder`; one that is there but cannot be loaded costs one warning, never an exception."""
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
        warnings.warn(f"laser_fast: {reason}; the torch reference runs instead; {REMEDY}", RuntimeWarning, stacklevel=2)
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
    """The compiled code of an operation on a device, or None where its torch reference must run (on a GPU: warned)."""
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
def warn_fallback(operation: str, reason: str, remedy: str = REMEDY) -> None:
    """Say once per process that an operation runs as its torch reference on a GPU, why, and what to do."""
    message = f"{operation}: the torch reference runs in place of the compiled kernel: {reason}"
    warnings.warn(f"{message}; {remedy}; `laser-fast doctor` lists what runs", RuntimeWarning, stacklevel=4)
