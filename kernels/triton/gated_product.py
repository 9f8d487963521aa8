"""The product in a gated MLP, out = act(gate) * up, and its gradients (Shazeer 2020, arXiv:2002.05202).

Memory-bound, one pass. A row of F numbers of b bytes moves 3 F b bytes forward and 5 F b backward: 86,016 and 143,360
for an 8B Llama's 14,336 numbers in half precision. Hugging Face's forward writes act(gate) and reads it back: 5 F b.

All three activations are x times a share in [0, 1], written so that nothing overflows before it is multiplied:

    silu       share = sigmoid(x)
    gelu_tanh  share = (1 + tanh u) / 2 = sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
    gelu       share = (1 + erf(x / sqrt(2))) / 2

The arithmetic is float32 and rounds once, at the store. A result depends on one element of each input, so launches are
bit-equal from run to run and gradients may take the place of gate and up. The kernels are our own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from laser_fast.kernels.rows import as_rows, row_stride

_BLOCK = 1024  # numbers a program moves of each tensor: 16 bytes a lane in half precision with 4 warps


@triton.jit
def _share_and_slope(x, ACTIVATION: tl.constexpr):
    """`act(x) / x` and its derivative, which the compiler drops from the forward pass."""
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        if ACTIVATION == "gelu_tanh":
            # beyond 16 the share is 0 or 1 in float32, and the cube of a large bfloat16 is infinite
            near = tl.minimum(tl.maximum(x, -16.0), 16.0)
            z = 1.5957691216057308 * near * (1.0 + 0.044715 * near * near)
            slope_z = 1.5957691216057308 * (1.0 + 0.134145 * near * near)
        else:
            z = x
            slope_z = 1.0
        # exp(-|z|) never overflows, and neither sigmoid(z) nor sigmoid(-z) is a difference, which would lose digits
        decay = tl.exp(-tl.abs(z))
        upper = 1.0 / (1.0 + decay)
        share = tl.where(z < 0.0, decay * upper, upper)
        slope = decay * upper * upper * slope_z
    return share, slope


@triton.jit
def _gated_product_forward_kernel(
    gate_ptr,  # [R, F]
    up_ptr,  # [R, F]
    out_ptr,  # [R, F], dense, out
    stride_gate_row,
    stride_up_row,
    num_columns,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_blocks = tl.cdiv(num_columns, BLOCK)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    gate = tl.load(gate_ptr + row * stride_gate_row + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up_row + columns, mask=mask, other=0.0).to(tl.float32)
    share, _ = _share_and_slope(gate, ACTIVATION)
    out = gate * share * up
    tl.store(out_ptr + row * num_columns + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_product_backward_kernel(
    grad_ptr,  # [R, F]
    gate_ptr,  # [R, F]
    up_ptr,  # [R, F]
    grad_gate_ptr,  # [R, F], out; may be gate
    grad_up_ptr,  # [R, F], out; may be up
    stride_grad_row,
    stride_gate_row,
    stride_up_row,
    stride_grad_gate_row,
    stride_grad_up_row,
    num_columns,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_blocks = tl.cdiv(num_columns, BLOCK)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    grad = tl.load(grad_ptr + row * stride_grad_row + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate_row + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up_row + columns, mask=mask, other=0.0).to(tl.float32)
    share, slope = _share_and_slope(gate, ACTIVATION)
    grad_gate = grad * up * (share + gate * slope)
    grad_up = grad * (gate * share)
    grad_gate_ptrs = grad_gate_ptr + row * stride_grad_gate_row + columns
    grad_up_ptrs = grad_up_ptr + row * stride_grad_up_row + columns
    tl.store(grad_gate_ptrs, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptrs, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask)


def gated_product_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Launch on gate and up [..., F] of one shape, checked by the operation -> [..., F], dense, dtype of gate."""
    out = gate.new_empty(gate.shape)
    if num_elements := gate.numel():
        num_columns = gate.shape[-1]
        (gate, stride_gate), (up, stride_up) = as_rows(gate), as_rows(up)
        grid = (num_elements // num_columns * -(-num_columns // _BLOCK),)
        with torch.cuda.device_of(gate):
            _gated_product_forward_kernel[grid](
                gate, up, out, stride_gate, stride_up, num_columns, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4
            )
    return out


def gated_product_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, grad_gate: Tensor, grad_up: Tensor
) -> None:
    """Launch on tensors [..., F] of one shape, checked by the operation; fills grad_gate and grad_up."""
    if num_elements := gate.numel():
        num_columns = gate.shape[-1]
        (grad, stride_grad), (gate, stride_gate), (up, stride_up) = as_rows(grad), as_rows(gate), as_rows(up)
        grid = (num_elements // num_columns * -(-num_columns // _BLOCK),)
        tensors = grad, gate, up, grad_gate, grad_up
        strides = stride_grad, stride_gate, stride_up, row_stride(grad_gate), row_stride(grad_up)
        with torch.cuda.device_of(gate):
            _gated_product_backward_kernel[grid](
                *tensors, *strides, num_columns, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4
            )
