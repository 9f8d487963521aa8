"""Query tokens to users and back: U[b k + j] = T[e_b[j]], P[b] = sum_j w_b[j] Y[b k + j], and their gradients.

Memory-bound. A slab is the [Q, D] of one expert or one output, taken as one row of C = Q D numbers:

    dispatch            reads E slabs, which stay in the cache, and writes B k
    dispatch, backward  reads B k and writes E, as a product with the one-hot choice: one pass serves all experts
    combine             reads B k and writes B
    combine, backward   reads B k + B and writes B k; a user's gradient is read k times, from memory once

Sums are float32 in a fixed order, no atomics: bit-equal from run to run. The kernels are our own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from laser_fast.kernels.tiles import padded_experts, precision_of, tile


@triton.jit
def _dispatch_kernel(
    queries_ptr,  # [E, C]
    expert_ptr,  # [B k] int32
    out_ptr,  # [B k, C], out
    num_columns,
    num_blocks,
    BLOCK: tl.constexpr,
):
    slab = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    source = tl.load(expert_ptr + slab).to(tl.int64)
    values = tl.load(queries_ptr + source * num_columns + columns, mask=mask, other=0.0)
    tl.store(out_ptr + slab * num_columns + columns, values, mask=mask)


@triton.jit(do_not_specialize=["num_slabs"])
def _dispatch_backward_kernel(
    grad_ptr,  # [B k, C]
    expert_ptr,  # [B k] int32
    grad_queries_ptr,  # [E, C], out
    num_slabs,
    num_columns,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column = columns < num_columns
    experts = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E, BLOCK_C), dtype=tl.float32)
    for start in range(0, num_slabs, BLOCK_R):
        slabs = start + tl.arange(0, BLOCK_R)
        is_slab = slabs < num_slabs
        grad = tl.load(
            grad_ptr + slabs[:, None].to(tl.int64) * num_columns + columns[None, :],
            mask=is_slab[:, None] & is_column[None, :],
            other=0.0,
        )
        chosen = tl.load(expert_ptr + slabs, mask=is_slab, other=-1)
        # 0 and 1 are exact in every dtype. "ieee" keeps a float32 gradient exact too: a sum of few slabs has no
        # rounding behind which one to TF32 parts could hide
        one_hot = (experts[:, None] == chosen[None, :]).to(grad.dtype)
        total = tl.dot(one_hot, grad, total, input_precision="ieee")
    tl.store(
        grad_queries_ptr + experts[:, None].to(tl.int64) * num_columns + columns[None, :],
        total.to(grad_queries_ptr.dtype.element_ty),
        mask=(experts < NUM_EXPERTS)[:, None] & is_column[None, :],
    )


@triton.jit
def _combine_kernel(
    outputs_ptr,  # [B k, C]
    weight_ptr,  # [B, k]
    out_ptr,  # [B, C], out
    num_columns,
    num_blocks,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    user = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(TOP_K):
        weight = tl.load(weight_ptr + user * TOP_K + choice).to(tl.float32)
        values = tl.load(outputs_ptr + (user * TOP_K + choice) * num_columns + columns, mask=mask, other=0.0)
        total += weight * values.to(tl.float32)
    tl.store(out_ptr + user * num_columns + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_backward_kernel(
    grad_ptr,  # [B, C]
    outputs_ptr,  # [B k, C]
    weight_ptr,  # [B k]
    grad_outputs_ptr,  # [B k, C], out where NEEDS_OUTPUTS
    grad_weight_ptr,  # [B k], out where NEEDS_WEIGHT
    num_columns,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    NEEDS_OUTPUTS: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
):
    # one program per user and choice, so that the weight's gradient is one sum in one program
    slab = tl.program_id(0).to(tl.int64)
    user = slab // TOP_K
    weight = tl.load(weight_ptr + slab).to(tl.float32)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        grad = tl.load(grad_ptr + user * num_columns + columns, mask=mask, other=0.0).to(tl.float32)
        if NEEDS_WEIGHT:
            values = tl.load(outputs_ptr + slab * num_columns + columns, mask=mask, other=0.0)
            products += grad * values.to(tl.float32)
        if NEEDS_OUTPUTS:
            scaled = (weight * grad).to(grad_outputs_ptr.dtype.element_ty)
            tl.store(grad_outputs_ptr + slab * num_columns + columns, scaled, mask=mask)
    if NEEDS_WEIGHT:
        tl.store(grad_weight_ptr + slab, tl.sum(products, axis=0).to(grad_weight_ptr.dtype.element_ty))


def dispatch_forward(queries: Tensor, expert: Tensor) -> Tensor:
    """Launch on queries [E, Q, D] and expert int32 [B, k], checked by the operation -> [B k, Q, D]."""
    queries, num_slabs, num_columns = queries.contiguous(), expert.numel(), queries.shape[1] * queries.shape[2]
    out = queries.new_empty(num_slabs, *queries.shape[1:])
    if num_slabs and num_columns:
        options = tile("dispatch", precision=precision_of(queries)).options(columns="BLOCK")
        num_blocks = triton.cdiv(num_columns, options["BLOCK"])
        with torch.cuda.device_of(queries):
            _dispatch_kernel[(num_slabs * num_blocks,)](
                queries, expert.contiguous(), out, num_columns, num_blocks, **options
            )
    return out


def dispatch_backward(grad: Tensor, expert: Tensor, num_experts: int) -> Tensor:
    """Launch on grad [B k, Q, D] and expert int32 [B, k], of at most 256 experts -> [E, Q, D], dtype of grad."""
    grad, num_slabs, num_columns = grad.contiguous(), grad.shape[0], grad.shape[1] * grad.shape[2]
    out = grad.new_empty(num_experts, *grad.shape[1:])
    if num_columns:
        block_experts = padded_experts(num_experts)
        options = tile("dispatch_backward", block_experts, precision_of(grad)).options("BLOCK_R", "BLOCK_C")
        options |= {"NUM_EXPERTS": num_experts, "BLOCK_E": block_experts}
        with torch.cuda.device_of(grad):
            _dispatch_backward_kernel[(triton.cdiv(num_columns, options["BLOCK_C"]),)](
                grad, expert.contiguous(), out, num_slabs, num_columns, **options
            )
    return out


def combine_forward(outputs: Tensor, weight: Tensor) -> Tensor:
    """Launch on outputs [B k, Q, D] and weight [B, k], checked by the operation -> [B, Q, D], dtype of outputs."""
    (num_users, top_k), num_columns = weight.shape, outputs.shape[1] * outputs.shape[2]
    out = outputs.new_empty(num_users, *outputs.shape[1:])
    if num_users and num_columns:
        options = tile("combine", precision=precision_of(outputs)).options(columns="BLOCK")
        num_blocks = triton.cdiv(num_columns, options["BLOCK"])
        with torch.cuda.device_of(outputs):
            _combine_kernel[(num_users * num_blocks,)](
                outputs.contiguous(), weight.contiguous(), out, num_columns, num_blocks, TOP_K=top_k, **options
            )
    return out


def combine_backward(
    grad: Tensor, outputs: Tensor, weight: Tensor, *, needs_outputs: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of outputs and weight in their dtypes; what is not needed is empty."""
    num_slabs, num_columns = outputs.shape[0], outputs.shape[1] * outputs.shape[2]
    grad_outputs = outputs.new_empty(outputs.shape if needs_outputs else (0,))
    grad_weight = weight.new_empty(weight.shape if needs_weight else (0,))
    if num_slabs and (needs_outputs or needs_weight):
        tensors = grad.contiguous(), outputs.contiguous(), weight.contiguous(), grad_outputs, grad_weight
        options = tile("combine_backward", precision=precision_of(outputs)).options(columns="BLOCK")
        needs = {"NEEDS_OUTPUTS": needs_outputs, "NEEDS_WEIGHT": needs_weight}
        with torch.cuda.device_of(outputs):
            _combine_backward_kernel[(num_slabs,)](*tensors, num_columns, TOP_K=weight.shape[1], **needs, **options)
    return grad_outputs, grad_weight
