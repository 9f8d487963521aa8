"""Section "roofs": what this device reaches at its best, measured here: copying, and products of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timing import interleaved_medians, wall_clock
from torch import Tensor

from reporting.tables import table

if TYPE_CHECKING:
    from reporting.context import Context, Deadline

_BUDGET_S = 0.6  # for each of them


@dataclass(frozen=True)
class Roofs:
    """Measured limits.

    Attributes:
        copy_gb_per_s: bytes read and written a second by a copy too large for any cache.
        matmul_tflops: 1e12 floating-point operations a second by dtype.
    """

    copy_gb_per_s: float
    matmul_tflops: Mapping[str, float]

    def seconds(self, moved_bytes: float, operations: float, dtype: str) -> float:
        """The least time in which that can be done: at the copy's speed, or at that of products if they take longer."""
        return max(moved_bytes / (self.copy_gb_per_s * 1e9), operations / (self.matmul_tflops[dtype] * 1e12))


class Product:
    """A product of two square matrices of random numbers: zeros multiply faster on a GPU.

    Attributes:
        operations: floating-point operations of one call.
    """

    def __init__(self, device: torch.device, dtype: str, size: int) -> None:
        self.operations = 2 * size**3
        self._left, self._right = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))

    def __call__(self) -> Tensor:
        """The product."""
        return self._left @ self._right


def measure_roofs(device: torch.device, copy_floats: int, matmul_size: int) -> Roofs:
    """Medians over half a second of runs each."""
    clock = wall_clock(torch.cuda.synchronize) if device.type == "cuda" else wall_clock()
    source = torch.ones(copy_floats, device=device)
    target = torch.empty_like(source)
    copy_s = interleaved_medians({"copy": lambda: target.copy_(source)}, clock, _BUDGET_S)["copy"]
    rates = {}
    for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        product = Product(device, dtype, matmul_size)
        seconds = interleaved_medians({"product": product}, clock, _BUDGET_S)["product"]
        rates[dtype] = product.operations / seconds / 1e12
    return Roofs(2 * source.nbytes / copy_s / 1e9, rates)


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """Both roofs and the sizes they were measured at."""
    roofs = context.roofs
    return {
        "copy_gb_per_s": roofs.copy_gb_per_s,
        "matmul_tflops": dict(roofs.matmul_tflops),
        "copied_bytes": 4 * context.settings.copy_floats,
        "matmul_size": context.settings.matmul_size,
    }


def markdown(found: Mapping[str, Any]) -> list[str]:
    """A table with one line a roof."""
    side = found["matmul_size"]
    rows = [[f"copy of {found['copied_bytes'] / 1e6:.0f} MB", f"{found['copy_gb_per_s']:.1f} GB/s read and written"]]
    rows += [
        [f"product of two {side} x {side} matrices, {dtype}", f"{rate:.4g} TFLOP/s"]
        for dtype, rate in found["matmul_tflops"].items()
    ]
    return ["Measured here, in this run. Every share below is a share of these.", "", *table(["roof", "rate"], rows)]
