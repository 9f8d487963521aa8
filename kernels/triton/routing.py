"""Routing of users to query experts, forward, in two launches (formulas: laser_fast.ops.routing).

Memory-bound: the item states X [N, D] are read once, 98 % of the bytes at D = 768, E = 8 and half precision. All else
is E numbers an item: the probabilities [N, E] are written and read back per user, and B (E + 2 k) numbers written.

Sums are float32 in a fixed order: within a tile, over the tiles of a program, then over the programs, whose number
depends on shapes and on how many multiprocessors the device has. There are no atomics: results are bit-equal from run
to run on one kind of device, and a user's do not depend on the rest of the batch. The kernels are our own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from laser_fast.kernels.rows import as_rows
from laser_fast.kernels.tiles import multiprocessors, padded_experts, precision_of, tile

_PROGRAMS = 8  # per multiprocessor: 2 E partial sums each, 66 KiB to add up at E = 8 on an H100
SMALL_BATCH = 16384  # items; fewer would leave multiprocessors idle at 32 rows a program


def item_options(kernel: str, states: Tensor, num_experts: int, size: str = "") -> dict[str, Any]:
    """BLOCK_E, the tile and PRODUCT of a pass over the items."""
    experts = padded_experts(num_experts)
    product = "tf32x3" if states.dtype == torch.float32 else "split"
    chosen = tile(kernel, experts, precision_of(states), size)
    return {"BLOCK_E": experts, "PRODUCT": product, **chosen.options("BLOCK_N", "BLOCK_D")}


def rows_per_program(num_items: int, block_rows: int, max_programs: int) -> int:
    """Whole tiles a program, so that at most `max_programs` serve all items."""
    return triton.cdiv(triton.cdiv(num_items, max_programs), block_rows) * block_rows


@triton.jit
def _split(values):
    """values = high + low, where high keeps the 11 significant bits of TF32 and low has the other 13."""
    high = (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, values - high


@triton.jit
def dot(left, values, total, PRODUCT: tl.constexpr):
    """total + left @ values in float32, by a kind of product.

    "split": `left` comes from half precision, which TF32 holds exactly, so two TF32 products keep 22 of the 24 bits of
    `values`. "tf32x3": three keep as many of both factors; at 495 TFLOP/s, where float32 multiplications ("ieee") have
    67 (NVIDIA's figures for H100), that is twice as fast. Three products of bfloat16 ("bf16x3") would be faster again,
    but keep 16 bits: over ten times the error of float32 sums at width 768, and experts would be chosen by it.

    Tensor cores round what they add up towards zero (Ootomo and Yokota, arXiv:2203.03341): a sum that stays in them
    from tile to tile drifts, at width 768 by ten times the error of float32 sums. So they add up a tile, and the tiles
    are added outside, as Triton itself does for "tf32x3".
    """
    if PRODUCT == "split":
        high, low = _split(values)
        total += tl.dot(left, high, tl.dot(left, low, input_precision="tf32"), input_precision="tf32")
    else:
        total = tl.dot(left, values, total, input_precision=PRODUCT)
    return total


@triton.jit
def _best(values):
    """Index of the largest value per row of [R, E], the lower among equals. NaN counts as largest, as in torch, so that
    the index is always that of a real expert."""
    return tl.argmax(tl.where(values != values, float("inf"), values), axis=1)


@triton.jit(do_not_specialize=["num_items", "rows_per_program"])
def _route_items_kernel(
    states_ptr,  # [N, D], rows stride_states apart
    router_ptr,  # [E, D]
    bias_ptr,  # [E]
    probability_ptr,  # [N, E] float32, out
    partial_ptr,  # [programs, 2, E] float32, out: summed probabilities, then votes
    num_items,
    width,
    stride_states,
    rows_per_program,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, num_items)
    experts = tl.arange(0, BLOCK_E)
    is_expert = experts < NUM_EXPERTS
    # padding experts get logits of -inf, hence probability 0
    bias = tl.load(bias_ptr + experts, mask=is_expert, other=float("-inf")).to(tl.float32)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    votes = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        is_row = rows < last
        logits = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
        for column in range(0, width, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            is_column = columns < width
            states = tl.load(
                states_ptr + rows[:, None] * stride_states + columns[None, :],
                mask=is_row[:, None] & is_column[None, :],
                other=0.0,
            )
            router = tl.load(
                router_ptr + experts[None, :] * width + columns[:, None],
                mask=is_expert[None, :] & is_column[:, None],
                other=0.0,
            )
            logits = dot(states.to(tl.float32), router.to(tl.float32), logits, PRODUCT)
        logits += bias[None, :]
        raised = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        probability = raised / tl.sum(raised, axis=1)[:, None]
        kept = is_row[:, None] & is_expert[None, :]
        tl.store(probability_ptr + rows[:, None] * NUM_EXPERTS + experts[None, :], probability, mask=kept)
        total += tl.sum(tl.where(kept, probability, 0.0), axis=0)
        remaining = tl.where(is_expert[None, :], probability, float("-inf"))
        for _ in range(TOP_K):
            best = _best(remaining)
            remaining = tl.where(experts[None, :] == best[:, None], float("-inf"), remaining)
        votes += tl.sum(tl.where(kept & (remaining == float("-inf")), 1.0, 0.0), axis=0)
    partial = partial_ptr + program * (2 * NUM_EXPERTS) + experts
    tl.store(partial, total, mask=is_expert)
    tl.store(partial + NUM_EXPERTS, votes, mask=is_expert)


@triton.jit
def _balance(
    partial_ptr,
    load_ptr,
    balance_ptr,
    num_items,
    num_programs,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Load per expert and the balance loss from the partial sums; both 0 without items."""
    experts = tl.arange(0, BLOCK_E)
    is_expert = experts < NUM_EXPERTS
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    votes = tl.zeros((BLOCK_E,), dtype=tl.float32)
    # tall tiles: every step waits for memory, and all users may be through before these few steps are
    for start in range(0, num_programs, BLOCK_PARTIALS):
        programs = start + tl.arange(0, BLOCK_PARTIALS)
        mask = (programs < num_programs)[:, None] & is_expert[None, :]
        partial = partial_ptr + programs[:, None].to(tl.int64) * (2 * NUM_EXPERTS) + experts[None, :]
        total += tl.sum(tl.load(partial, mask=mask, other=0.0), axis=0)
        votes += tl.sum(tl.load(partial + NUM_EXPERTS, mask=mask, other=0.0), axis=0)
    count = tl.maximum(num_items, 1).to(tl.float32)
    load = votes / count
    tl.store(load_ptr + experts, load, mask=is_expert)
    tl.store(balance_ptr, tl.sum(total * load, axis=0) * (NUM_EXPERTS / count))


@triton.jit(do_not_specialize=["num_items", "num_programs"])
def _route_users_kernel(
    partial_ptr,  # [programs, 2, E] float32
    cu_seqlens_ptr,  # [B + 1] int32
    weight_ptr,  # [B, k] float32, out
    pooled_ptr,  # [B, E] float32, out
    balance_ptr,  # [] float32, out
    expert_ptr,  # [B, k] int32, out
    load_ptr,  # [E] float32, out
    probability_ptr,  # [N, E] float32
    num_items,
    num_programs,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    # the first program adds up the batch, so that its longer loop runs beside the users of all others
    if tl.program_id(0) == 0:
        _balance(partial_ptr, load_ptr, balance_ptr, num_items, num_programs, NUM_EXPERTS, BLOCK_PARTIALS, BLOCK_E)
    else:
        user = tl.program_id(0).to(tl.int64) - 1
        experts = tl.arange(0, BLOCK_E)
        is_expert = experts < NUM_EXPERTS
        first = tl.load(cu_seqlens_ptr + user).to(tl.int64)
        last = tl.load(cu_seqlens_ptr + user + 1).to(tl.int64)
        total = tl.zeros((BLOCK_E,), dtype=tl.float32)
        for start in range(first, last, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            mask = (rows < last)[:, None] & is_expert[None, :]
            values = tl.load(probability_ptr + rows[:, None] * NUM_EXPERTS + experts[None, :], mask=mask, other=0.0)
            total += tl.sum(values, axis=0)
        length = (last - first).to(tl.float32)
        pooled = tl.where(length > 0, total / tl.maximum(length, 1.0), 1.0 / NUM_EXPERTS)
        tl.store(pooled_ptr + user * NUM_EXPERTS + experts, pooled, mask=is_expert)

        choices = tl.arange(0, BLOCK_K)
        chosen = tl.zeros((BLOCK_K,), dtype=tl.int32)
        value = tl.full((BLOCK_K,), float("-inf"), dtype=tl.float32)
        remaining = tl.where(is_expert, pooled, float("-inf"))
        for choice in range(TOP_K):
            best = tl.sum(_best(remaining[None, :]), axis=0)
            remaining = tl.where(experts == best, float("-inf"), remaining)
            chosen = tl.where(choices == choice, best, chosen)
            found = tl.sum(tl.where(experts == best, pooled, 0.0), axis=0)
            value = tl.where(choices == choice, found, value)
        is_choice = choices < TOP_K
        if SOFTMAX:
            share = tl.exp(value - tl.max(value, axis=0))
        else:
            share = tl.where(is_choice, value, 0.0)
        tl.store(expert_ptr + user * TOP_K + choices, chosen, mask=is_choice)
        tl.store(weight_ptr + user * TOP_K + choices, share / tl.sum(share, axis=0), mask=is_choice)


class RoutingResult(NamedTuple):
    """As `laser_fast.ops.Routing`, and probability [N, E] float32 for backward."""

    weight: Tensor
    pooled: Tensor
    balance_loss: Tensor
    expert: Tensor
    load: Tensor
    probability: Tensor


def route_forward(
    states: Tensor, router: Tensor, bias: Tensor, cu_seqlens: Tensor, top_k: int, weighting: str
) -> RoutingResult:
    """Launch on states [N, D], router [E, D], bias [E] and cu_seqlens int32 [B + 1], checked by the operation.

    No float64, at most 256 experts (one tile holds all of an item). Nothing is read back from the device.
    """
    (num_items, width), num_experts, num_users = states.shape, router.shape[0], cu_seqlens.shape[0] - 1
    states, stride_states = as_rows(states)
    block_experts = triton.next_power_of_2(num_experts)
    options = item_options("route_items", states, num_experts, "few" if num_items < SMALL_BATCH else "many")
    rows = rows_per_program(num_items, options["BLOCK_N"], _PROGRAMS * multiprocessors(states.device))
    num_programs = triton.cdiv(num_items, rows) if num_items else 0
    new = partial(states.new_empty, dtype=torch.float32)
    result = RoutingResult(
        weight=new((num_users, top_k)),
        pooled=new((num_users, num_experts)),
        balance_loss=new(()),
        expert=states.new_empty((num_users, top_k), dtype=torch.int32),
        load=new((num_experts,)),
        probability=new((num_items, num_experts)),
    )
    partial_sums = new((num_programs, 2, num_experts))
    with torch.cuda.device_of(states):
        if num_items:
            tensors = states, router.contiguous(), bias.contiguous(), result.probability, partial_sums
            _route_items_kernel[(num_programs,)](
                *tensors, num_items, width, stride_states, rows, NUM_EXPERTS=num_experts, TOP_K=top_k, **options
            )
        _route_users_kernel[(num_users + 1,)](
            *(partial_sums, cu_seqlens.contiguous(), *result),
            num_items,
            num_programs,
            NUM_EXPERTS=num_experts,
            TOP_K=top_k,
            BLOCK_K=triton.next_power_of_2(top_k),
            SOFTMAX=weighting == "softmax",
            BLOCK_E=block_experts,
            **tile("route_users", block_experts).options("BLOCK_ROWS", "BLOCK_PARTIALS"),
        )
    return result
