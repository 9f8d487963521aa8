"""Section "environment": on what, with which versions, from which commit and by which command."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from laser_fast.runs.run_directory import describe_environment
from reporting.tables import plain, size, table

if TYPE_CHECKING:
    from reporting.context import Context, Deadline

_MORE_PACKAGES = ("liger-kernel", "peft", "pytest-benchmark")
_DIRTY = "-dirty"


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """What `describe_environment` knows, and the GPU's driver, memory and architecture."""
    known = describe_environment()
    commit = known["commit"]
    known["dirty"] = None if commit is None else commit.endswith(_DIRTY)
    known["commit"] = None if commit is None else commit.removesuffix(_DIRTY)
    for name in _MORE_PACKAGES:
        try:
            known["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return known | {"load_average": load, "gpu": _gpu() if context.on_gpu else None}


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    lines = said.stdout.split()
    return lines[0] if said.returncode == 0 and lines else None


def markdown(found: Mapping[str, Any]) -> list[str]:
    """A table of names and values."""
    state = {True: ", with changes that are not committed", False: ", as committed", None: ""}[found["dirty"]]
    rows = [
        ["date", found["date"]],
        ["commit", f"{found['commit']}{state}"],
        ["processor", f"{found['processor']}, {found['cores']} cores, of which torch uses {found['threads']}"],
        ["load of the processor at the start", plain(found.get("load_average"))],
        ["system", f"{found['system']}, Python {found['python']}"],
    ]
    gpu = found["gpu"]
    if gpu is not None:
        rows.append(["GPU", f"{gpu['name']}, {size(gpu['memory_bytes'])}, {gpu['multiprocessors']} multiprocessors"])
        rows.append(["CUDA", f"{gpu['cuda']}, driver {gpu['driver']}, compute capability {gpu['compute_capability']}"])
    rows.append(["versions", ", ".join(f"{name} {number}" for name, number in found["versions"].items())])
    return table(["", "value"], rows)
