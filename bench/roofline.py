"""The limits of a device, measured: how fast it copies, and how fast it multiplies matrices."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timing import Clock, idle_clock, interleaved_medians
from torch import Tensor

_BUDGET_S = 0.6  # for each of them


@dataclass(frozen=True)
class Roofs:
    """Measured limits.

    Attributes:
        copy_gb_per_s: bytes read and written a second by a copy too large for any cache.
        matmul_tflops: 1e12 floating-point operations a second, by dtype.
    """

    copy_gb_per_s: float
    matmul_tflops: Mapping[str, float]

    def seconds(self, moved_bytes: float, operations: float, dtype: str) -> float:
        """The least time in which that can be done: at the copy's speed, or at that of products if they take longer."""
        return max(moved_bytes / (self.copy_gb_per_s * 1e9), operations / (self.matmul_tflops[dtype] * 1e12))


class Product:
    """A product of two square matrices of random numbers: zeros multiply faster on a GPU."""

    def __init__(self, device: torch.device, dtype: str, size: int) -> None:
        self.operations = 2 * size**3
        self._left, self._right = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))

    def __call__(self) -> Tensor:
        return self._left @ self._right


def measure_copy(device: torch.device, floats: int, clock: Clock, budget_s: float = _BUDGET_S) -> float:
    """Gigabytes read and written a second by a copy of so many float32 numbers."""
    source = torch.ones(floats, device=device)
    target = torch.empty_like(source)
    seconds = interleaved_medians({"copy": lambda: target.copy_(source)}, clock, budget_s)["copy"]
    return 2 * source.nbytes / seconds / 1e9


def measure_roofs(device: torch.device, copy_floats: int, matmul_size: int) -> Roofs:
    """Medians over half a second of runs each."""
    clock = idle_clock(device)
    copy_gb_per_s, rates = measure_copy(device, copy_floats, clock), {}
    for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        product = Product(device, dtype, matmul_size)
        seconds = interleaved_medians({"product": product}, clock, _BUDGET_S)["product"]
        rates[dtype] = product.operations / seconds / 1e12
    return Roofs(copy_gb_per_s, rates)
