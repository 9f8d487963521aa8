"""The frozen model's kernels, compiled for every supported architecture: registers, spills, and how wide they read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the kernels are written in Triton")

pytestmark = pytest.mark.slow

Row = dict[str, Any]

CAPABILITIES = (80, 86, 89, 90, 120)
PRODUCTS = ("_gated_product_forward_kernel", "_gated_product_backward_kernel")
NORMS = ("_rms_norm_forward_kernel", "_rms_norm_backward_kernel")
SPILLING_WIDTH = 32768  # 32 numbers a lane of every tensor, at 64 registers a lane

# Registers a lane with 16 numbers or fewer of every tensor: the largest of any architecture and of Triton 3.6 and 3.9,
# rounded up to the eight in which they are handed out. 32 warps can have 64.
REGISTERS = {PRODUCTS[0]: 40, PRODUCTS[1]: 48, NORMS[0]: 56, NORMS[1]: 64}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """All kernels of all architectures."""
    from triton import knobs

    for tool in ("ptxas", "cuobjdump"):
        try:
            getattr(knobs.nvidia, tool).path  # noqa: B018, looks the file up
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"this Triton has no {tool}: {error}")
    folder = tmp_path_factory.mktemp("frozen")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("compile_frozen.py")
    if other := os.environ.get("LASER_FAST_TRITON"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (other, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(program), str(folder / "rows.json"), "chosen", *map(str, CAPABILITIES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[Row] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["kernels"]
    return rows


def _width(row: Row) -> int:
    return int(row["case"].split("-")[1]) if row["case"].startswith("norm") else 0


def test_every_kernel_compiles_for_every_architecture(compiled: list[Row]) -> None:
    for capability in CAPABILITIES:
        rows = [row for row in compiled if row["capability"] == capability]
        assert {row["kernel"] for row in rows} == {*PRODUCTS, *NORMS}
        assert len({row["case"] for row in rows}) == 12


def test_nothing_is_spilled_up_to_a_width_of_16384(compiled: list[Row]) -> None:
    spilled = [row for row in compiled if row["spilled_bytes"]]
    assert {(row["kernel"], _width(row)) for row in spilled} <= {(NORMS[1], SPILLING_WIDTH)}
    assert max(row["spilled_bytes"] for row in compiled) <= 136
    over = [row for row in compiled if row["registers"] > REGISTERS[row["kernel"]] and _width(row) < SPILLING_WIDTH]
    assert [(row["kernel"], row["case"], row["capability"], row["registers"]) for row in over] == []


def test_every_tensor_is_read_and_written_once_16_bytes_a_lane(compiled: list[Row]) -> None:
    for row in compiled:
        if row["kernel"] in PRODUCTS:
            wide = 1 if row["case"].endswith("bf16") else 2  # 1,024 numbers, 128 lanes
            loads, stores = (2, 1) if row["kernel"] == PRODUCTS[0] else (3, 2)
            assert row["loads"] == {"16": loads * wide}, row
            assert row["stores"] == {"16": stores * wide}, row
        elif _width(row) > 2048:  # rows that a program has to itself
            wide = (1 if row["case"].endswith("bf16") else 2) * (4 if _width(row) == SPILLING_WIDTH else 2)
            tensors = 3 if row["kernel"] == NORMS[1] else 2  # the weight is one of them
            reciprocal = row["loads"].pop("4", 0) + row["stores"].pop("4", 0)
            assert reciprocal == 1, row
            assert row["loads"] == {"16": tensors * wide}, row
            assert row["stores"] == {"16": wide}, row
        else:  # a head: the weight is a number a lane
            assert row["loads"]["16"] >= 2 and row["stores"]["16"] == 2, row
            assert row["loads"].get("2", 0) == 1, row


def test_no_offset_wraps_and_no_sum_is_atomic(compiled: list[Row]) -> None:
    assert [(row["kernel"], row["case"]) for row in compiled if row["narrow_offsets"] or row["float_atomics"]] == []
