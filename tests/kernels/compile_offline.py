"""Compile every Triton kernel as the launchers would launch it, for GPUs that are not there.

`python compile_offline.py RESULT.json 80 90` runs each launcher on CPU tensors with a driver that names the target and
never launches; what would have been launched is compiled with Triton's own ptxas and described in RESULT.json. It is a
program of its own because Triton decides at import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from laser_fast.kernels import dispatch, routing, routing_backward

Run = Callable[[], object]


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


def _pointer_widths(ttir: str) -> list[str]:
    """Integer type of every pointer offset: "i32" or "i64"."""
    return re.findall(r"tt\.addptr .*, (?:tensor<[\dx]*)?(i\d+)>?(?: loc|$)", ttir, flags=re.MULTILINE)


def describe(name: str, case: str, capability: int, kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    return {
        "kernel": name,
        "case": case,
        "capability": capability,
        **_resources(kernel.asm["cubin"]),
        "shared_bytes": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        "offset_types": _pointer_widths(kernel.asm["ttir"]),
        "wide_loads": len(
            re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\S*\.global \[.*\], 0x10", ptx)
        ),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", ptx)),
        "float_atomics": len(re.findall(r"(?:atom|red)\.\S*\.f(?:16|32|64)", ptx)),
    }


def _routing(num_items: int, num_experts: int, top_k: int, dtype: torch.dtype, width: int = 768) -> Run:
    def run() -> None:
        states, router = torch.empty(num_items, width, dtype=dtype), torch.empty(num_experts, width)
        cu_seqlens, num_users = torch.empty(257, dtype=torch.int32), 256
        result = routing.route_forward(states, router, torch.empty(num_experts), cu_seqlens, top_k, "softmax", None)
        grads = torch.empty(num_users, top_k), torch.empty(num_users, num_experts), torch.empty(())
        routing_backward.route_backward(
            *grads, states, router, cu_seqlens, result, "softmax", needs_states=True, needs_router=True
        )

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


def cases() -> dict[str, Run]:
    """Every tile of the tables: the sizes of the papers in both precisions, and each padded number of experts."""
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[f"streams-{name}"] = _streams(dtype)
        found[f"routing-E8-few-items-{name}"] = _routing(5120, 8, 3, dtype)
        for num_experts in (8, 32, 64, 128, 256):
            found[f"routing-E{num_experts}-{name}"] = _routing(20480, num_experts, 2, dtype)
            found[f"dispatch-backward-E{num_experts}-{name}"] = _dispatch_backward(num_experts, dtype)
    return found


def main() -> None:
    result, capabilities = Path(sys.argv[1]), [int(argument) for argument in sys.argv[2:]]
    rows: list[dict[str, Any]] = []
    launch = JITFunction.run
    case = ""

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        rows.append(describe(self.fn.__name__, case, driver.active.get_current_target().arch, kernel))
        return kernel

    JITFunction.run = record
    for capability in capabilities:
        driver.set_active(OfflineDriver(capability))
        for case, run in cases().items():  # noqa: B007, `record` reads it
            run()
    result.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
