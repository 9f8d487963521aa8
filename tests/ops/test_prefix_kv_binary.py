"""What the compiler made of the kernels of prefix injection: widths of accesses, registers, and no spills."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from laser_fast.ops import backends

LIBRARY = Path(backends.__file__).resolve().parents[1] / "_native" / "laser_fast_native.so"
NEWEST, OLDEST = 120, 80

# 65536 registers of a multiprocessor: 48 leave room for 5 blocks of 256 threads. A copy needs many rows in flight.
MOST_REGISTERS = {
    "inject_prefix_kv_kernel": 48,
    "gather_prefix_kv_kernel": 48,
    "sum_prefix_kv_kernel": 48,
    "probe_kernel": 16,
}


def find_cuobjdump() -> str | None:
    """That of CUDA_HOME, on PATH, beside the nvcc that PATH leads to, or the one that Triton brings."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump")
    return found or next((str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").is_file()), None)


def dump(*options: str) -> str:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump (CUDA_HOME, PATH, Triton)")
    if backends.load_native().level != "cuda":
        pytest.skip(f"the library was built without CUDA: {backends.load_native().reason}")
    # cuobjdump looks for nvdisasm on PATH
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])
    command = [cuobjdump, *options, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}).stdout


@cache
def resources() -> dict[int, dict[str, dict[str, int]]]:
    """Per architecture and mangled kernel: registers, stack, local and shared memory."""
    found: dict[int, dict[str, dict[str, int]]] = {}
    architecture = 0
    lines = dump("--dump-resource-usage").splitlines()
    for number, line in enumerate(lines):
        if match := re.search(r"\barch = sm_(\d+)", line):
            architecture = int(match.group(1))
        if match := re.match(r"\s*Function (\w+):", line):
            facts = {
                name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", lines[number + 1])
            }
            found.setdefault(architecture, {})[match.group(1)] = facts
    return found


@cache
def instructions() -> dict[int, dict[str, str]]:
    """Of the oldest and the newest architecture, per mangled kernel: its instructions."""
    found: dict[int, dict[str, str]] = {}
    for architecture in (OLDEST, NEWEST):
        text = dump("--dump-sass", "--gpu-architecture", f"sm_{architecture}")
        found[architecture] = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function : |\Z)", text, re.DOTALL))
    return found


def kernel_of(mangled: str) -> str:
    """The name of a kernel within a mangled one."""
    found = re.search(r"(?:inject|gather|sum)_prefix_kv_kernel|probe_kernel", mangled)
    assert found is not None, mangled
    return found.group()


def test_every_architecture_is_there_with_every_kernel() -> None:
    found = resources()
    assert (min(found), max(found)) == (OLDEST, NEWEST)
    assert {kernel_of(name) for name in found[OLDEST]} == set(MOST_REGISTERS)
    assert all(set(of_architecture) == set(found[OLDEST]) for of_architecture in found.values())


def test_no_kernel_spills_or_uses_too_many_registers() -> None:
    for architecture, kernels in resources().items():
        for name, facts in kernels.items():
            where = f"sm_{architecture} {name}"
            assert (facts["STACK"], facts["LOCAL"]) == (0, 0), where
            assert facts["REG"] <= MOST_REGISTERS[kernel_of(name)], where


def wide(mangled: str) -> bool:
    """Whether a kernel is one for 16-byte accesses: words of uint4, or as many elements as 16 bytes hold."""
    return "5uint4" in mangled or bool(re.search(r"Li[248]E", mangled))


@pytest.mark.slow
def test_wide_kernels_load_and_store_128_bits() -> None:
    for architecture, kernels in instructions().items():
        assert set(kernels) == set(resources()[architecture])
        names = [name for name in kernels if wide(name)]
        assert {kernel_of(name) for name in names} == {kernel_of(name) for name in kernels} - {"probe_kernel"}
        for name in names:
            where = f"sm_{architecture} {name}"
            loads = re.findall(r"\bLDG\.E\.128\b", kernels[name])
            # key and value; a copy has four of either under way
            assert len(loads) >= (8 if "5uint4" in name else 1), where
            # a sum reads B rows for one that it writes, and that one some compilers write in parts
            if kernel_of(name) != "sum_prefix_kv_kernel":
                assert re.search(r"\bSTG\.E\.128\b", kernels[name]), where
            tensors = re.findall(r"\bSTG\.E\.(?:U8|U16|S16)\b", kernels[name])
            assert not tensors, f"{where} writes single elements"


@pytest.mark.slow
def test_narrow_kernels_are_no_wide_ones() -> None:
    for kernels in instructions().values():
        narrow = [text for name, text in kernels.items() if not wide(name) and kernel_of(name) != "probe_kernel"]
        assert narrow
        assert not any(re.search(r"\bSTG\.E\.128\b", text) for text in narrow)
