"""RMSNorm with a frozen weight, y = x r * (offset + w) with r = 1 / sqrt(mean(x^2) + eps), and its gradient to x.

    grad_x = r (m - x r mean(m x r)),  m = grad (offset + w)

Memory-bound, one pass: a program holds whole rows in registers. A row of D numbers of b bytes moves 2 D b + 4 bytes
forward, also where y is made again from r, and 3 D b + 4 backward: 16,388 and 24,580 for an 8B Llama's 4,096 numbers
in half precision. The weight stays in the cache. Hugging Face's forward writes and reads a row of float32 in between.

The arithmetic is float32 and the sums have one order, so launches are bit-equal from run to run.
Source: Zhang & Sennrich 2019, arXiv:1910.07467; the kernels are our own.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from laser_fast.kernels.rows import as_rows

_TILE = 2048  # numbers a program holds, where a row is shorter: 16 a lane, two loads of 16 bytes in half precision


@triton.jit
def _scaled(x, reciprocal, weight, OFFSET: tl.constexpr, LATE_WEIGHT: tl.constexpr, DTYPE: tl.constexpr):
    """y of float32 rows and weight, not yet rounded to its dtype; DTYPE is that of x."""
    normalized = x * reciprocal
    if LATE_WEIGHT:
        return normalized.to(DTYPE).to(tl.float32) * weight
    return normalized * (weight + OFFSET)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_forward_kernel(
    x_ptr,  # [R, D]
    weight_ptr,  # [D]
    y_ptr,  # [R, D], dense, out
    reciprocal_ptr,  # [R] float32, out; where NEEDS_RECIPROCAL is false it is read
    stride_x_row,
    num_rows,
    num_columns,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    LATE_WEIGHT: tl.constexpr,
    NEEDS_RECIPROCAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    is_row, is_column = rows < num_rows, columns < num_columns
    mask = is_row[:, None] & is_column[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x_row + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    if NEEDS_RECIPROCAL:
        reciprocal = tl.rsqrt(tl.sum(x * x, axis=1) / num_columns + EPS)
        tl.store(reciprocal_ptr + rows, reciprocal, mask=is_row)
    else:
        reciprocal = tl.load(reciprocal_ptr + rows, mask=is_row, other=0.0)
    y = _scaled(x, reciprocal[:, None], weight[None, :], OFFSET, LATE_WEIGHT, x_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * num_columns + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_kernel(
    grad_ptr,  # [R, D]
    x_ptr,  # [R, D]
    weight_ptr,  # [D]
    reciprocal_ptr,  # [R] float32
    grad_x_ptr,  # [R, D], dense, out
    stride_grad_row,
    stride_x_row,
    num_rows,
    num_columns,
    OFFSET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    is_row, is_column = rows < num_rows, columns < num_columns
    mask = is_row[:, None] & is_column[None, :]
    grad = tl.load(grad_ptr + rows[:, None] * stride_grad_row + columns[None, :], mask=mask, other=0.0)
    x = tl.load(x_ptr + rows[:, None] * stride_x_row + columns[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    reciprocal = tl.load(reciprocal_ptr + rows, mask=is_row, other=0.0)[:, None]
    normalized = x.to(tl.float32) * reciprocal
    scaled = grad.to(tl.float32) * (weight + OFFSET)[None, :]
    mean = tl.sum(scaled * normalized, axis=1) / num_columns
    grad_x = (scaled - normalized * mean[:, None]) * reciprocal
    grad_x = grad_x.to(grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + rows[:, None] * num_columns + columns[None, :], grad_x, mask=mask)


@cache  # a model has a few widths, and triton's own arithmetic costs microseconds of a call
def _tile(num_columns: int) -> dict[str, int]:
    """Whole rows of a program, and warps for 16 numbers a lane, or 32 where 32 warps are not enough."""
    columns = triton.next_power_of_2(num_columns)
    rows = max(1, _TILE // columns)
    return {"BLOCK_R": rows, "BLOCK_D": columns, "num_warps": min(max(rows * columns // 512, 1), 32)}


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, late_weight: bool, reciprocal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch on x [..., D] and weight [D], checked by the operation -> y [..., D], dense, and r, float32 [..., 1].

    `late_weight`, which goes with an offset of 0, rounds the normalised row to the dtype of x before the weight
    multiplies it; y then has the dtype of both together. A `reciprocal` that an earlier launch on x returned gives its
    y again, bit for bit.
    """
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype) if late_weight else x.dtype)
    needs_reciprocal = reciprocal is None
    if reciprocal is None:
        reciprocal = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if num_rows := reciprocal.numel():
        num_columns = x.shape[-1]
        x, stride_x = as_rows(x)
        tensors, tile = (x, weight.contiguous(), y, reciprocal.contiguous()), _tile(num_columns)
        kind = {"EPS": eps, "OFFSET": offset, "LATE_WEIGHT": late_weight, "NEEDS_RECIPROCAL": needs_reciprocal}
        with torch.cuda.device_of(x):
            _rms_norm_forward_kernel[(-(-num_rows // tile["BLOCK_R"]),)](
                *tensors, stride_x, num_rows, num_columns, **kind, **tile
            )
    return y, reciprocal


def rms_norm_backward(grad: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, offset: float) -> Tensor:
    """Launch on grad and x [..., D], reciprocal float32 [..., 1] and weight [D] -> gradient of x, dense, its dtype."""
    grad_x = x.new_empty(x.shape)
    if num_rows := reciprocal.numel():
        num_columns = x.shape[-1]
        (grad, stride_grad), (x, stride_x) = as_rows(grad), as_rows(x)
        tensors, tile = (grad, x, weight.contiguous(), reciprocal.contiguous(), grad_x), _tile(num_columns)
        with torch.cuda.device_of(x):
            _rms_norm_backward_kernel[(-(-num_rows // tile["BLOCK_R"]),)](
                *tensors, stride_grad, stride_x, num_rows, num_columns, OFFSET=offset, **tile
            )
    return grad_x
