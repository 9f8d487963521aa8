"""Compile every Triton kernel as the launchers would launch it, for GPUs that are not there.

`python compile_offline.py RESULT.json candidates 80 90` runs each launcher on CPU tensors with a driver that names the
target and never launches; what would have been launched is compiled with Triton's own ptxas and described in
RESULT.json. "chosen" in place of "candidates" leaves out the tiles that do not run yet. It is a program of its own
because Triton decides at import whether kernels are interpreted or compiled, and which Triton it is (PYTHONPATH).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from ttir_offsets import narrow_offsets

from laser_fast.kernels import dispatch, gated_product, rms_norm, rotary, routing, routing_backward
from laser_fast.kernels.tiles import TILES, Key, Tile, running

Run = Callable[[], object]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXPERTS = (8, 32, 64, 128, 256)
_MLP_WIDTH = 14336  # of an 8B Llama


class OfflineDriver:
    """Says that device 0 is of one architecture; all that compiling asks of a driver."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@cache
def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a lane, and bytes of stack and local memory, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert usage is not None, report
    return {"registers": int(usage[1]), "spilled_bytes": int(usage[2]) + int(usage[3])}


def _accesses(ptx: str, operation: str) -> dict[int, int]:
    """How many instructions load from, or store to, global memory, by bytes a lane."""
    pattern = rf"\b{operation}\.global(?:\.(?!v\d|[bfsu]\d)[\w:]+)*(?:\.v(\d))?\.[bfsu](\d+)"
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in re.findall(pattern, ptx)]
    if operation == "ld":  # copies to shared memory, ahead of their use
        sizes += [int(size, 16) for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global.* (0x\w+),", ptx)]
    return dict(Counter(sizes))


def describe(name: str, case: str, capability: int, kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    return {
        "kernel": name,
        "case": case,
        "capability": capability,
        **_resources(kernel.asm["cubin"]),
        "shared_bytes": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        "narrow_offsets": narrow_offsets(kernel.asm["ttir"]),
        "loads": _accesses(ptx, "ld"),
        "stores": _accesses(ptx, "st"),
        "float_atomics": len(re.findall(r"\b(?:atom|red)\.\S*\.(?:b?f(?:16|32|64))", ptx)),
    }


@triton.jit
def _narrow_control_kernel(values_ptr, stride, BLOCK: tl.constexpr):
    """Multiplies a program id and a stride at 32 bits, which the check of offsets has to see."""
    offsets = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(values_ptr + offsets, tl.load(values_ptr + offsets) + 1)


def _control() -> None:
    _narrow_control_kernel[(1,)](torch.empty(64), 64, BLOCK=64)


def _routing(num_items: int, num_experts: int, top_k: int, dtype: torch.dtype, weighting: str = "softmax") -> Run:
    def run() -> None:
        states, router = torch.empty(num_items, 768, dtype=dtype), torch.empty(num_experts, 768)
        cu_seqlens, num_users = torch.empty(257, dtype=torch.int32), 256
        bias = torch.empty(num_experts)
        result = routing.route_forward(states, router, bias, cu_seqlens, top_k, weighting)
        grads = torch.empty(num_users, top_k), torch.empty(num_users, num_experts), torch.empty(())
        options = {"weighting": weighting, "needs": (True, True)}
        routing_backward.route_backward(grads, states, router, cu_seqlens, result, **options)

    return run


def _dispatch_backward(num_experts: int, dtype: torch.dtype) -> Run:
    grad, expert = torch.empty(48, 32, 768, dtype=dtype), torch.empty(16, 3, dtype=torch.int32)
    return lambda: dispatch.dispatch_backward(grad, expert, num_experts)


def _streams(dtype: torch.dtype) -> Run:
    """The kernels of dispatch and combine whose tiles do not depend on the number of experts."""

    def run() -> None:
        expert, weight = torch.empty(16, 3, dtype=torch.int32), torch.empty(16, 3)
        outputs = dispatch.dispatch_forward(torch.empty(8, 32, 768, dtype=dtype), expert)
        combined = dispatch.combine_forward(outputs, weight)
        dispatch.combine_backward(combined, outputs, weight, needs_outputs=True, needs_weight=True)

    return run


def _rotary(head_size: int, width: int, dtype: torch.dtype, table: torch.dtype) -> Run:
    """As the projections of a model hand them over: 32 heads of queries, 8 of keys, both ways."""

    def run() -> None:
        query, key = (torch.empty(16, heads, head_size, dtype=dtype) for heads in (32, 8))
        cos, sin = torch.empty(2, 16, width, dtype=table)
        for transposed in (False, True):
            rotary.rotary(query, key, cos, sin, transposed=transposed)

    return run


def _product(activation: str, dtype: torch.dtype, *, joint: bool) -> Run:
    """Forward and backward, of two matrices or of one (Phi-3), whose halves backward fills in place."""

    def run() -> None:
        both = torch.empty(32, 2 * _MLP_WIDTH, dtype=dtype)
        gate, up = both.chunk(2, dim=-1)
        if not joint:
            gate, up = gate.contiguous(), up.contiguous()
        out = gated_product.gated_product_forward(gate, up, activation)
        gated_product.gated_product_backward(out, gate, up, activation, gate, up)

    return run


def _norm(width: int, dtype: torch.dtype, *, late_weight: bool) -> Run:
    """Forward, the same again from the reciprocals, and backward."""

    def run() -> None:
        x, weight = torch.empty(32, width, dtype=dtype), torch.empty(width, dtype=dtype)
        kind = (1e-6, 0.0 if late_weight else 1.0, late_weight)
        y, reciprocal = rms_norm.rms_norm_forward(x, weight, *kind)
        rms_norm.rms_norm_forward(x, weight, *kind, reciprocal)
        rms_norm.rms_norm_backward(y, x, reciprocal, weight, kind[1])

    return run


def cases() -> dict[str, Run]:
    """Every tile that runs: the sizes of the papers in both precisions, and each padded number of experts.

    Sizes that are no powers of two, so that a tile's length is no other size, and the other branches: `odd`. Of the
    frozen model: activations, halves of one tensor, and the widths of a head, of layers, and wider.
    """
    found = {"control": _control}
    for name, dtype in DTYPES.items():
        found[f"streams-{name}"] = _streams(dtype)
        for size, width in ((64, 64), (128, 128), (96, 96), (80, 32)):
            found[f"rotary-{size}-{width}-{name}"] = _rotary(size, width, dtype, dtype)
        found[f"rotary-128-128-wide-tables-{name}"] = _rotary(128, 128, dtype, torch.float32)
        found[f"routing-E8-few-items-{name}"] = _routing(5120, 8, 3, dtype)
        found[f"odd-{name}"] = _routing(20480, 33, 3, dtype, "renormalize")
        for num_experts in EXPERTS:
            found[f"routing-E{num_experts}-{name}"] = _routing(20480, num_experts, 2, dtype)
            found[f"dispatch-backward-E{num_experts}-{name}"] = _dispatch_backward(num_experts, dtype)
        found[f"product-silu-{name}"] = _product("silu", dtype, joint=False)
        found[f"norm-8192-{name}"] = _norm(8192, dtype, late_weight=name == "bf16")
    for activation in ("silu", "gelu_tanh", "gelu"):
        found[f"product-{activation}-joint-bf16"] = _product(activation, torch.bfloat16, joint=True)
    for width in (128, 4096, 5120, 16384, 32768):
        found[f"norm-{width}-bf16"] = _norm(width, torch.bfloat16, late_weight=width != 5120)
    return found


def _launcher(key: Key) -> Run:
    """What launches the kernel of a key, among others."""
    dtype = torch.float32 if key.precision == "float" else torch.bfloat16
    num_experts = 8 if key.experts <= 16 else key.experts
    if key.kernel == "dispatch_backward":
        return _dispatch_backward(num_experts, dtype)
    if key.kernel in ("dispatch", "combine", "combine_backward"):
        return _streams(dtype)
    return _routing(5120 if key.size == "few" else 20480, num_experts, 2, dtype)


def candidates() -> dict[str, tuple[Key, Run]]:
    """Every tile that could run instead."""
    found = {}
    for key, tiles in TILES.items():
        for candidate in tiles[1:]:

            def run(key: Key = key, candidate: Tile = candidate) -> None:
                with running(key, candidate):
                    _launcher(key)()

            found[f"candidate-{key}-{candidate}"] = key, run
    return found


def main() -> None:
    """Compile all cases, and where the command line says "candidates" also those, of which one kernel each counts."""
    result, wanted, *capabilities = sys.argv[1:]
    rows: list[dict[str, Any]] = []
    launch = JITFunction.run
    case, only = "", ""

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        if only and self.fn.__name__ != only:
            return None
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        rows.append(describe(self.fn.__name__, case, driver.active.get_current_target().arch, kernel))
        return kernel

    JITFunction.run = record
    for capability in capabilities:
        driver.set_active(OfflineDriver(int(capability)))
        only = ""
        for case, run in cases().items():  # noqa: B007, `record` reads it
            run()
        for case, (key, run) in (candidates() if wanted == "candidates" else {}).items():  # noqa: B007
            only = f"_{key.kernel}_kernel"
            run()
    facts = {"triton": triton.__version__, "folder": str(Path(triton.__file__).parent), "kernels": rows}
    Path(result).write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
