"""Every kernel, compiled at its shipped sizes for a GPU that is not there: what each costs.

For the architecture on which tiles are timed; where LASER_FAST_COMPILE is "all", for every supported one, and the tiles
that do not run yet too. With the Triton that is installed, or with that in the folder which LASER_FAST_TRITON names:

    pip install --no-deps --target FOLDER triton==3.6.0
    LASER_FAST_COMPILE=all LASER_FAST_TRITON=FOLDER pytest tests/kernels/test_compile_offline.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

from laser_fast.kernels.tiles import TILES

pytestmark = pytest.mark.slow

Row = dict[str, Any]

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # a block's limit (CUDA programming guide, table 27)
EVERYTHING = os.environ.get("LASER_FAST_COMPILE") == "all"
TIMED = 90
CAPABILITIES = list(SHARED_KIB) if EVERYTHING else [TIMED]
DTYPES = ("bf16", "fp32")
EXPERTS = (8, 32, 64, 128, 256)
ROTARY = ("64-64", "128-128", "128-128-wide-tables", "96-96", "80-32")  # head size, width of the tables

PRODUCTS = ("_gated_product_forward_kernel", "_gated_product_backward_kernel")
NORMS = ("_rms_norm_forward_kernel", "_rms_norm_backward_kernel")
SPILLING_WIDTH = 32768  # 32 numbers a lane of every tensor, at 64 registers a lane

_ROUTING = ("_route_items_kernel", "_route_users_kernel", "_grad_logits_kernel", "_grad_items_kernel")
_KERNELS_OF_A_CASE = {
    "streams": ("_dispatch_kernel", "_combine_kernel", "_combine_backward_kernel"),
    "odd": (*_ROUTING, "_sum_partials_kernel"),
    "routing": (*_ROUTING, "_sum_partials_kernel"),
    "dispatch-backward": ("_dispatch_backward_kernel",),
    "rotary": ("_rotary_kernel",),
    "product": PRODUCTS,
    "norm": NORMS,
}

# Registers a lane at 8 experts: the largest of any architecture and dtype, rounded up to the eight in which they are
# handed out, plus sixteen for another ptxas. Twice as many would halve the warps that hide the memory's latency. The
# frozen model's have 16 numbers of every tensor a lane or fewer, and no sixteen more: 32 warps can have 64.
REGISTERS = {
    "_dispatch_kernel": 40,
    "_combine_kernel": 56,
    "_combine_backward_kernel": 56,
    "_dispatch_backward_kernel": 72,
    "_route_items_kernel": 240,
    "_route_users_kernel": 72,
    "_grad_logits_kernel": 64,
    "_grad_items_kernel": 184,
    "_sum_partials_kernel": 80,
    "_rotary_kernel": 72,
    PRODUCTS[0]: 40,
    PRODUCTS[1]: 48,
    NORMS[0]: 56,
    NORMS[1]: 64,
}

# Loads of 8 and of 4 bytes a lane at 8 experts that are no slab and no state: indices, weights, biases, and the
# gradient of the logits, of which a tile has two numbers a lane. None has 2 bytes, as a state that is loaded alone.
NARROW_LOADS = {
    "_dispatch_kernel": (0, 1),
    "_combine_kernel": (0, 3),
    "_combine_backward_kernel": (0, 1),
    "_dispatch_backward_kernel": (0, 3),
    "_route_items_kernel": (2, 1),
    "_grad_items_kernel": (3, 0),
    "_rotary_kernel": (0, 0),
}
WIDE_STORES = ("_dispatch_kernel", "_combine_kernel", "_combine_backward_kernel", "_dispatch_backward_kernel")
WIDE_STORES += ("_grad_items_kernel", "_rotary_kernel")


def _expected() -> set[tuple[str, str]]:
    """Every kernel in every case."""
    cases = [f"routing-E{experts}" for experts in EXPERTS] + ["routing-E8-few-items", "odd", "streams"]
    cases += [f"dispatch-backward-E{experts}" for experts in EXPERTS]
    cases += [f"rotary-{sizes}" for sizes in ROTARY]
    found = set()
    for case in cases:
        kernels = next(names for prefix, names in _KERNELS_OF_A_CASE.items() if case.startswith(prefix))
        found |= {(kernel, f"{case}-{dtype}") for kernel in kernels for dtype in DTYPES}
    frozen = [f"product-{kind}-bf16" for kind in ("silu", "silu-joint", "gelu_tanh-joint", "gelu-joint")]
    frozen += [f"norm-{width}-bf16" for width in (128, 4096, 5120, 8192, 16384, 32768)]
    for case in (*frozen, "product-silu-fp32", "norm-8192-fp32"):
        found |= {(kernel, case) for kernel in (PRODUCTS if case.startswith("product") else NORMS)}
    return found


def _compile(capability: int, folder: Path) -> list[Row]:
    result = folder / f"sm_{capability}.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder / f"cache_{capability}"),  # nothing compiled before is read
        "TRITON_DEFAULT_FP_FUSION": "1",  # says what is the default, which silences a warning
        "OMP_NUM_THREADS": "1",
    }
    if other := os.environ.get("LASER_FAST_TRITON"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (other, os.environ.get("PYTHONPATH"))))
    program = Path(__file__).with_name("compile_offline.py")
    wanted = "candidates" if EVERYTHING and capability == TIMED else "chosen"
    command = [sys.executable, str(program), str(result), wanted, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(result.read_text(encoding="utf-8"))
    if other:
        assert Path(facts["folder"]) == Path(other).resolve() / "triton"
    rows: list[Row] = facts["kernels"]
    return rows


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Row]]:
    """Rows per architecture; two are compiled at a time."""
    from triton import knobs

    for tool in ("ptxas", "cuobjdump"):
        try:
            getattr(knobs.nvidia, tool).path  # noqa: B018, looks the file up
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"this Triton has no {tool}: {error}")
    folder = tmp_path_factory.mktemp("offline")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda capability: _compile(capability, folder), CAPABILITIES)
        return dict(zip(CAPABILITIES, results, strict=True))


@pytest.fixture(params=CAPABILITIES, ids=lambda capability: f"sm_{capability}")
def rows(request: pytest.FixtureRequest, compiled: dict[int, list[Row]]) -> list[Row]:
    """All kernels of one architecture, but for the control."""
    return [row for row in compiled[request.param] if row["case"] != "control"]


@pytest.fixture
def chosen(rows: list[Row]) -> list[Row]:
    """Of these, the ones whose tiles run."""
    return [row for row in rows if not row["case"].startswith("candidate")]


def _at_the_papers_size(rows: list[Row]) -> list[Row]:
    """8 experts, and what does not depend on their number: heads of 64 and 128, rotated as a whole."""
    whole = ("streams", "rotary-64", "rotary-128", "product", "norm")
    return [row for row in rows if "-E8-" in row["case"] or row["case"].startswith(whole)]


def _offenders(rows: list[Row], field: str) -> list[tuple[str, str, Any]]:
    return [(row["kernel"], row["case"], row[field]) for row in rows]


def test_every_kernel_compiles_in_every_case(chosen: list[Row]) -> None:
    assert {(row["kernel"], row["case"]) for row in chosen} == _expected()


@pytest.mark.skipif(
    not EVERYTHING, reason="only the tiles that run are compiled; the others need LASER_FAST_COMPILE=all"
)
def test_every_candidate_compiles(compiled: dict[int, list[Row]]) -> None:
    rows = [row for row in compiled[TIMED] if row["case"].startswith("candidate")]
    assert len(rows) == sum(len(tiles) - 1 for tiles in TILES.values())
    assert {row["kernel"] for row in rows} == {f"_{key.kernel}_kernel" for key, tiles in TILES.items() if tiles[1:]}


def _width(row: Row) -> int:
    return int(row["case"].split("-")[1]) if row["case"].startswith("norm") else 0


def test_no_register_is_spilled_but_by_the_widest_norm(rows: list[Row]) -> None:
    spilled = [row for row in rows if row["spilled_bytes"]]
    assert {(row["kernel"], _width(row)) for row in spilled} <= {(NORMS[1], SPILLING_WIDTH)}
    assert all(row["spilled_bytes"] <= 136 for row in spilled)


def test_shared_memory_is_within_the_chips_limit(rows: list[Row]) -> None:
    over = [row for row in rows if row["shared_bytes"] > SHARED_KIB[row["capability"]] << 10]
    assert _offenders(over, "shared_bytes") == []
    assert max(row["shared_bytes"] for row in rows) > 16 << 10  # the figure is read at all


def test_registers_are_within_their_bounds(chosen: list[Row]) -> None:
    judged = [row for row in _at_the_papers_size(chosen) if _width(row) < SPILLING_WIDTH]
    assert {row["kernel"] for row in judged} == set(REGISTERS)
    assert _offenders([row for row in judged if row["registers"] > REGISTERS[row["kernel"]]], "registers") == []


def test_states_and_slabs_are_loaded_16_bytes_a_lane(chosen: list[Row]) -> None:
    for row in _at_the_papers_size(chosen):
        if row["kernel"] not in NARROW_LOADS:
            continue
        loads, (eights, fours) = row["loads"], NARROW_LOADS[row["kernel"]]
        assert loads.get("16", 0) > 0, row
        assert loads.get("8", 0) <= eights, row
        assert loads.get("4", 0) <= fours, row
        assert not {"1", "2"} & set(loads), row


def test_slabs_and_gradients_are_stored_16_bytes_a_lane(chosen: list[Row]) -> None:
    for row in _at_the_papers_size(chosen):
        if row["kernel"] in WIDE_STORES:
            assert row["stores"].get("16", 0) > 0, row
            assert not {"1", "2", "8"} & set(row["stores"]), row
            # the gradients of the weight and of the bias, one store each
            assert row["stores"].get("4", 0) <= 1, row


def test_the_frozen_models_kernels_read_and_write_every_tensor_once(chosen: list[Row]) -> None:
    for row in chosen:
        if row["kernel"] in PRODUCTS:
            wide = 1 if row["case"].endswith("bf16") else 2  # 1,024 numbers, 128 lanes
            loads, stores = (2, 1) if row["kernel"] == PRODUCTS[0] else (3, 2)
            assert row["loads"] == {"16": loads * wide}, row
            assert row["stores"] == {"16": stores * wide}, row
        elif _width(row) > 2048:  # rows that a program has to itself
            wide = (1 if row["case"].endswith("bf16") else 2) * (4 if _width(row) == SPILLING_WIDTH else 2)
            tensors = 3 if row["kernel"] == NORMS[1] else 2  # the weight is one of them
            assert row["loads"].get("4", 0) + row["stores"].get("4", 0) == 1, row  # the reciprocal
            assert {**row["loads"], "4": 0} == {"16": tensors * wide, "4": 0}, row
            assert {**row["stores"], "4": 0} == {"16": wide, "4": 0}, row
        elif _width(row):  # a head: the weight is a number a lane
            assert row["loads"]["16"] >= 2 and row["stores"]["16"] == 2, row
            assert row["loads"].get("2", 0) == 1, row


def test_no_sum_depends_on_the_order_of_atomics(rows: list[Row]) -> None:
    assert _offenders([row for row in rows if row["float_atomics"]], "float_atomics") == []


def test_no_offset_wraps_at_32_bits(rows: list[Row]) -> None:
    assert _offenders([row for row in rows if row["narrow_offsets"]], "narrow_offsets") == []


def test_the_check_of_offsets_sees_one_that_wraps(compiled: dict[int, list[Row]]) -> None:
    for kernels in compiled.values():
        (control,) = [row for row in kernels if row["case"] == "control"]
        assert len(control["narrow_offsets"]) == 1
