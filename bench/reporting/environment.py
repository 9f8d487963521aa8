"""Sections "environment" and "roofs": the machine, the versions, the commit, and how fast the device is at its best."""

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import nvidia_smi
import torch

from laser_fast.runs.run_directory import describe_environment
from reporting.context import Context, Deadline
from reporting.tables import plain, size, table

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
        "driver": nvidia_smi.device()["driver"],
    }


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


def measure_roofs(context: Context, deadline: Deadline) -> dict[str, Any]:
    """Both roofs and the sizes they were measured at."""
    return {
        "copy_gb_per_s": context.roofs.copy_gb_per_s,
        "matmul_tflops": dict(context.roofs.matmul_tflops),
        "copied_bytes": 4 * context.settings.copy_floats,
        "matmul_size": context.settings.matmul_size,
    }


def roofs_markdown(found: Mapping[str, Any]) -> list[str]:
    """A table with one line a roof."""
    side = found["matmul_size"]
    rows = [[f"copy of {found['copied_bytes'] / 1e6:.0f} MB", f"{found['copy_gb_per_s']:.1f} GB/s read and written"]]
    rows += [
        [f"product of two {side} x {side} matrices, {dtype}", f"{rate:.4g} TFLOP/s"]
        for dtype, rate in found["matmul_tflops"].items()
    ]
    return ["Measured here, in this run. Every share below is a share of these.", "", *table(["roof", "rate"], rows)]
