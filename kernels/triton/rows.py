"""Tensors [..., C] as kernels address them: R rows of C adjacent numbers, a fixed stride apart."""

from __future__ import annotations

from torch import Tensor


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What a kernel reads, and the elements from row to row; copied only where rows are not dense or evenly spaced."""
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    rows = (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).reshape(-1, tensor.shape[-1])
    return rows, rows.stride(0)


def row_stride(output: Tensor) -> int:
    """Elements from row to row of a tensor that a kernel writes, so no copy; its rows must be dense."""
    return output.shape[-1] if output.is_contiguous() else output.view(-1, output.shape[-1]).stride(0)
