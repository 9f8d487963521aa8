"""Query tokens to users and back: `U[b k + j] = T[e_b[j]]` and `P[b] = sum_j w_b[j] Y[b k + j]`.

Both are deterministic and add up in float32 whatever autocast says (float64 stays float64).
Source: Laser (Zhang et al., arXiv:2409.01605), M-Former.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laser_fast.ops.backends import triton_serves
from laser_fast.ops.checks import check_dimensions, check_dtype, check_floating, check_one_device, validate_indices
from laser_fast.ops.operation import operation, wanted
from laser_fast.ops.precision import autocast_off, wide_dtype


def dispatch_queries_reference(queries: Tensor, expert: Tensor) -> Tensor:
    """`dispatch_queries` in plain differentiable PyTorch, on any device; arguments are trusted."""
    return queries.index_select(0, expert.reshape(-1))


@operation("laser_fast::dispatch_queries")
def _dispatch_queries(queries: Tensor, expert: Tensor) -> Tensor:
    validate_indices("dispatch_queries", "expert", expert, queries.shape[0])
    if triton_serves("dispatch_queries", queries):
        from laser_fast.kernels.dispatch import dispatch_forward  # triton is needed only on a GPU

        return dispatch_forward(queries, expert)
    return dispatch_queries_reference(queries, expert).contiguous()


@_dispatch_queries.register_fake
def _(queries: Tensor, expert: Tensor) -> Tensor:
    return queries.new_empty((expert.shape[0] * expert.shape[1], *queries.shape[1:]))


def _sum_by_product(grad: Tensor, expert: Tensor, num_experts: int) -> Tensor:
    """A product with the one-hot choice, in a fixed order, where index_add would use atomics on a GPU."""
    wide = wide_dtype(grad)
    one_hot = torch.arange(num_experts, device=expert.device).unsqueeze(1) == expert.reshape(1, -1)
    with autocast_off(grad.device):
        total = one_hot.to(wide) @ grad.reshape(grad.shape[0], grad.shape[1] * grad.shape[2]).to(wide)
    return total.view(num_experts, *grad.shape[1:]).to(grad.dtype)


@operation("laser_fast::dispatch_queries_backward")
def _dispatch_queries_backward(grad: Tensor, expert: Tensor, num_experts: int) -> Tensor:
    if triton_serves("dispatch_queries", grad, num_experts=num_experts):
        from laser_fast.kernels.dispatch import dispatch_backward

        return dispatch_backward(grad, expert, num_experts)
    if grad.device.type != "cpu":
        return _sum_by_product(grad, expert, num_experts)
    # here index_add adds in a fixed order (32 users, 3 chosen, 32 x 256: 0.1 ms, the product 0.4)
    total = grad.new_zeros((num_experts, *grad.shape[1:]), dtype=wide_dtype(grad))
    return total.index_add_(0, expert.reshape(-1), grad.to(total.dtype)).to(grad.dtype)


@_dispatch_queries_backward.register_fake
def _(grad: Tensor, expert: Tensor, num_experts: int) -> Tensor:
    return grad.new_empty((num_experts, *grad.shape[1:]))


def _save_expert(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    queries, expert = inputs
    ctx.save_for_backward(expert)
    ctx.num_experts = queries.shape[0]


def _backward_dispatch(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
    (expert,) = ctx.saved_tensors
    return _dispatch_queries_backward(grad, expert, ctx.num_experts), None


_dispatch_queries.register_autograd(_backward_dispatch, setup_context=_save_expert)


def dispatch_queries(queries: Tensor, expert: Tensor) -> Tensor:
    """Query tokens of every chosen expert: `result[b k + j] = queries[expert[b, j]]`. Backward keeps only `expert`.

    Args:
        queries: [E, Q, D], floating point, any strides.
        expert: int32 [B, k], values 0 to E - 1.

    Returns:
        [B k, Q, D], dtype of `queries`, contiguous.
    """
    name = "dispatch_queries"
    check_floating(name, queries=queries)
    check_dtype(name, torch.int32, expert=expert)
    check_dimensions(name, 3, queries=queries)
    check_dimensions(name, 2, expert=expert)
    check_one_device(name, queries=queries, expert=expert)
    dispatched: Tensor = _dispatch_queries(queries, expert)
    return dispatched


def combine_queries_reference(outputs: Tensor, weight: Tensor) -> Tensor:
    """`combine_queries` in plain differentiable PyTorch, on any device; arguments are trusted."""
    num_users, top_k = weight.shape
    _, num_queries, width = outputs.shape
    wide = wide_dtype(outputs, weight)
    slabs = outputs.reshape(num_users, top_k, num_queries * width).to(wide)
    with autocast_off(outputs.device):
        total = torch.bmm(weight.to(wide).unsqueeze(1), slabs)
    return total.view(num_users, num_queries, width).to(outputs.dtype)


@operation("laser_fast::combine_queries")
def _combine_queries(outputs: Tensor, weight: Tensor) -> Tensor:
    if triton_serves("combine_queries", outputs, weight):
        from laser_fast.kernels.dispatch import combine_forward

        return combine_forward(outputs, weight)
    return combine_queries_reference(outputs, weight)


@_combine_queries.register_fake
def _(outputs: Tensor, weight: Tensor) -> Tensor:
    return outputs.new_empty((weight.shape[0], *outputs.shape[1:]))


@operation("laser_fast::combine_queries_backward")
def _combine_queries_backward(
    grad: Tensor, outputs: Tensor, weight: Tensor, needs_outputs: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    if triton_serves("combine_queries", outputs, weight):
        from laser_fast.kernels.dispatch import combine_backward

        return combine_backward(grad, outputs, weight, needs_outputs=needs_outputs, needs_weight=needs_weight)
    wide = wide_dtype(outputs, weight)
    num_users, top_k = weight.shape
    grad_outputs, grad_weight = outputs.new_empty(0), weight.new_empty(0)
    wide_grad = grad.unsqueeze(1).to(wide)
    if needs_outputs:
        # contiguous: the product has the strides of its factors, of a transposed weight say
        spread = weight.to(wide).reshape(num_users, top_k, 1, 1) * wide_grad
        grad_outputs = spread.to(outputs.dtype).contiguous().view(outputs.shape)
    if needs_weight:
        slabs = outputs.reshape(num_users, top_k, *outputs.shape[1:]).to(wide)
        grad_weight = (slabs * wide_grad).sum(dim=(2, 3)).to(weight.dtype).contiguous()
    return grad_outputs, grad_weight


@_combine_queries_backward.register_fake
def _(grad: Tensor, outputs: Tensor, weight: Tensor, needs_outputs: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    grad_outputs = outputs.new_empty(outputs.shape if needs_outputs else (0,))
    return grad_outputs, weight.new_empty(weight.shape if needs_weight else (0,))


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _combine_queries_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad)
    return tuple(wanted(grads, ctx.needs_input_grad))


_combine_queries.register_autograd(_backward_combine, setup_context=_save_inputs)


def combine_queries(outputs: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs: `result[b] = sum_j weight[b, j] outputs[b k + j]`, rounded once.

    Backward keeps both inputs.

    Args:
        outputs: [B k, Q, D], floating point, any strides.
        weight: [B, k], floating point (float32 from `route_experts`).

    Returns:
        [B, Q, D], dtype of `outputs`, contiguous.
    """
    name = "combine_queries"
    check_floating(name, outputs=outputs, weight=weight)
    check_dimensions(name, 3, outputs=outputs)
    check_dimensions(name, 2, weight=weight)
    check_one_device(name, outputs=outputs, weight=weight)
    if outputs.shape[0] != weight.numel():
        raise ValueError(
            f"{name}: outputs must have one slab per entry of weight, "
            f"got {outputs.shape[0]} slabs and weight {tuple(weight.shape)}"
        )
    combined: Tensor = _combine_queries(outputs, weight)
    return combined
