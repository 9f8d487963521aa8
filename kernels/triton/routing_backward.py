"""Gradients of the routing, in three launches (formulas: laser_fast.ops.routing).

The first gives the gradient of the logits [N, E] per user, the second dX and, for each range of items, the router's
gradient, the third the sum of these. Memory-bound: X [N, D] is read and dX written once, 97 % of the bytes at D = 768,
E = 8 and half precision. Float32 sums in a fixed order, no atomics: bit-equal from run to run. The kernels are our own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from laser_fast.kernels.routing import RoutingResult, dot, item_options, rows_per_program
from laser_fast.kernels.rows import as_rows
from laser_fast.kernels.tiles import multiprocessors, tile

_PARTIAL_BYTES = 8 << 20  # bound on the partial sums of the router's gradient, which stay in the L2 cache
_RANGES = 2  # of items, per multiprocessor; times the column blocks, 24 programs at width 768
_MOST_ON_TENSOR_CORES = 64  # experts; the parts of more would not fit into registers


@triton.jit(do_not_specialize=["num_items"])
def _grad_logits_kernel(
    grad_weight_ptr,  # [B, k] float32
    grad_pooled_ptr,  # [B, E] float32
    grad_balance_ptr,  # [] float32
    cu_seqlens_ptr,  # [B + 1] int32
    expert_ptr,  # [B, k] int32
    weight_ptr,  # [B, k] float32
    pooled_ptr,  # [B, E] float32
    load_ptr,  # [E] float32
    probability_ptr,  # [N, E] float32
    grad_logits_ptr,  # [N, E] float32, out
    num_items,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    user = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    is_expert = experts < NUM_EXPERTS
    choices = tl.arange(0, BLOCK_K)
    first = tl.load(cu_seqlens_ptr + user).to(tl.int64)
    last = tl.load(cu_seqlens_ptr + user + 1).to(tl.int64)
    pooled = tl.load(pooled_ptr + user * NUM_EXPERTS + experts, mask=is_expert, other=0.0)
    grad = tl.load(grad_pooled_ptr + user * NUM_EXPERTS + experts, mask=is_expert, other=0.0)
    chosen_weight = tl.load(weight_ptr + user * TOP_K + choices, mask=choices < TOP_K, other=0.0)
    chosen_grad = tl.load(grad_weight_ptr + user * TOP_K + choices, mask=choices < TOP_K, other=0.0)
    # the weights' Jacobian, for both weightings: w (g - sum w g), divided by the chosen sum where they are renormalised
    inner = tl.sum(chosen_weight * chosen_grad, axis=0)
    chosen_sum = tl.zeros((), dtype=tl.float32)
    if not SOFTMAX:
        for choice in range(TOP_K):
            best = tl.load(expert_ptr + user * TOP_K + choice)
            chosen_sum += tl.sum(tl.where(experts == best, pooled, 0.0), axis=0)
    for choice in range(TOP_K):
        best = tl.load(expert_ptr + user * TOP_K + choice)
        along = tl.load(grad_weight_ptr + user * TOP_K + choice) - inner
        if SOFTMAX:
            along *= tl.load(weight_ptr + user * TOP_K + choice)
        else:
            along /= chosen_sum
        grad += tl.where(experts == best, along, 0.0)
    grad /= tl.maximum(last - first, 1).to(tl.float32)
    load = tl.load(load_ptr + experts, mask=is_expert, other=0.0)
    grad += tl.load(grad_balance_ptr) * load * (NUM_EXPERTS / num_items.to(tl.float32))
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < last)[:, None] & is_expert[None, :]
        offsets = rows[:, None] * NUM_EXPERTS + experts[None, :]
        probability = tl.load(probability_ptr + offsets, mask=mask, other=0.0)
        mean = tl.sum(probability * grad[None, :], axis=1)
        tl.store(grad_logits_ptr + offsets, probability * (grad[None, :] - mean[:, None]), mask=mask)


@triton.jit(do_not_specialize=["num_items", "rows_per_program"])
def _grad_items_kernel(
    grad_logits_ptr,  # [N, E] float32
    states_ptr,  # [N, D], rows stride_states apart
    router_ptr,  # [E, D]
    grad_states_ptr,  # [N, D], out where NEEDS_STATES
    partial_ptr,  # [programs, pitch] float32, out: per program the router's gradient [E, D], then the bias's [E]
    num_items,
    width,
    stride_states,
    rows_per_program,
    pitch,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRODUCT: tl.constexpr,
    NEEDS_STATES: tl.constexpr,
    NEEDS_ROUTER: tl.constexpr,
):
    # neighbours in the grid share their rows of grad_logits through the cache
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    program = tl.program_id(1).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, num_items)
    experts = tl.arange(0, BLOCK_E)
    is_expert = experts < NUM_EXPERTS
    is_column = columns < width
    is_router = is_expert[:, None] & is_column[None, :]
    router = tl.load(router_ptr + experts[:, None] * width + columns[None, :], mask=is_router, other=0.0).to(tl.float32)
    # the states of the product stand on the left where half precision makes them exact, [D, N] x [N, E]; float32 on the
    # right, [E, N] x [N, D], where they need no transposition, for which Triton would load them 4 bytes at a time
    if PRODUCT == "tf32x3":
        grad_router = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
    else:
        grad_router = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        is_row = rows < last
        is_state = is_row[:, None] & is_column[None, :]
        grad = tl.load(
            grad_logits_ptr + rows[:, None] * NUM_EXPERTS + experts[None, :],
            mask=is_row[:, None] & is_expert[None, :],
            other=0.0,
        )
        grad_bias += tl.sum(grad, axis=0)
        if NEEDS_ROUTER:
            states = tl.load(
                states_ptr + rows[:, None] * stride_states + columns[None, :], mask=is_state, other=0.0
            ).to(tl.float32)
            if PRODUCT == "tf32x3":
                grad_router = dot(tl.trans(grad), states, grad_router, PRODUCT)
            else:
                grad_router = dot(tl.trans(states), grad, grad_router, PRODUCT)
        if NEEDS_STATES:
            grad_states = tl.dot(grad, router, input_precision="ieee" if PRODUCT == "ieee" else "tf32x3")
            tl.store(
                grad_states_ptr + rows[:, None] * width + columns[None, :],
                grad_states.to(grad_states_ptr.dtype.element_ty),
                mask=is_state,
            )
    partial = partial_ptr + program * pitch
    if NEEDS_ROUTER:
        if PRODUCT != "tf32x3":
            grad_router = tl.trans(grad_router)
        tl.store(partial + experts[:, None] * width + columns[None, :], grad_router, mask=is_router)
    if tl.program_id(0) == 0:
        tl.store(partial + NUM_EXPERTS * width + experts, grad_bias, mask=is_expert)


@triton.jit(do_not_specialize=["num_programs"])
def _sum_partials_kernel(
    partial_ptr,  # [programs, pitch] float32
    router_ptr,  # float32, out: the first `split` columns
    bias_ptr,  # float32, out: the others
    first_column,
    split,
    num_columns,
    pitch,
    num_programs,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = first_column + tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = columns < num_columns
    total = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
    for start in range(0, num_programs, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_programs)[:, None] & is_column[None, :]
        offsets = rows[:, None].to(tl.int64) * pitch + columns[None, :]
        total += tl.sum(tl.load(partial_ptr + offsets, mask=mask, other=0.0), axis=0)
    tl.store(router_ptr + columns, total, mask=columns < split)
    tl.store(bias_ptr + (columns - split), total, mask=(columns >= split) & is_column)


def _grad_logits(
    grads: tuple[Tensor, Tensor, Tensor], cu_seqlens: Tensor, result: RoutingResult, weighting: str
) -> Tensor:
    """Float32 [N, E]; one program per user."""
    (num_items, num_experts), (num_users, top_k) = result.probability.shape, result.expert.shape
    grad_logits = torch.empty_like(result.probability)
    block_experts = triton.next_power_of_2(num_experts)
    _grad_logits_kernel[(num_users,)](
        *(grad.contiguous() for grad in grads),
        cu_seqlens.contiguous(),
        *(result.expert, result.weight, result.pooled, result.load, result.probability, grad_logits),
        num_items,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        BLOCK_E=block_experts,
        BLOCK_K=triton.next_power_of_2(top_k),
        SOFTMAX=weighting == "softmax",
        **tile("grad_logits", block_experts).options("BLOCK_ROWS"),
    )
    return grad_logits


def _sum_partials(partial: Tensor, grad_router: Tensor, grad_bias: Tensor, first_column: int) -> None:
    """Add up `partial` [programs, pitch] into the gradients, from the first column that is needed."""
    router_size = grad_router.numel() or first_column
    num_columns = router_size + grad_bias.numel()
    options = tile("sum_partials").options("BLOCK_ROWS", "BLOCK_COLUMNS")
    columns, (num_programs, pitch) = (first_column, router_size, num_columns), partial.shape
    _sum_partials_kernel[(triton.cdiv(num_columns - first_column, options["BLOCK_COLUMNS"]),)](
        partial, grad_router, grad_bias, *columns, pitch, num_programs, **options
    )


def route_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    states: Tensor,
    router: Tensor,
    cu_seqlens: Tensor,
    result: RoutingResult,
    *,
    weighting: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of states (their dtype), router and bias (float32), from those of weight, pooled and balance loss.

    `needs` is of states and router; what is not needed is empty. `result` is that of `route_forward`, of which
    `balance_loss` is not read. Nothing is read back from the device.
    """
    needs_states, needs_router = needs
    (num_items, width), num_experts = states.shape, router.shape[0]
    (states, stride_states), router = as_rows(states), router.contiguous()
    grad_states = states.new_empty((num_items, width) if needs_states else (0,))
    if num_items == 0:
        zeros = result.load.new_zeros(num_experts, width) if needs_router else result.load.new_empty(0)
        return grad_states, zeros, result.load.new_zeros(num_experts)
    grad_router = result.load.new_empty((num_experts, width) if needs_router else (0,))
    grad_bias = result.load.new_empty(num_experts)

    options = item_options("grad_items", states, num_experts)
    if options["BLOCK_E"] > _MOST_ON_TENSOR_CORES:
        options["PRODUCT"] = "ieee"
    router_size = num_experts * width
    max_programs = min(max(_PARTIAL_BYTES // (4 * router_size), 16), _RANGES * multiprocessors(states.device))
    rows = rows_per_program(num_items, options["BLOCK_N"], max_programs)
    num_programs = triton.cdiv(num_items, rows)
    pitch = triton.cdiv(router_size + num_experts, 16) * 16  # rows start where 16-byte loads may
    partial = result.load.new_empty(num_programs, pitch)
    column_blocks = triton.cdiv(width, options["BLOCK_D"]) if needs_states or needs_router else 1
    with torch.cuda.device_of(states):
        grad_logits = _grad_logits(grads, cu_seqlens, result, weighting)
        _grad_items_kernel[(column_blocks, num_programs)](
            *(grad_logits, states, router, grad_states, partial),
            *(num_items, width, stride_states, rows, pitch),
            NUM_EXPERTS=num_experts,
            NEEDS_STATES=needs_states,
            NEEDS_ROUTER=needs_router,
            **options,
        )
        _sum_partials(partial, grad_router, grad_bias, 0 if needs_router else router_size)
    return grad_states, grad_router, grad_bias
