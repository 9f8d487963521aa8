"""Routing of users to query experts, with the load-balancing loss.

    s_i = softmax(W x_i + c)                 router probabilities of item i
    g_b = mean of s_i over the items of b    1 / E for an empty history
    e_b = the k largest of g_b               the lower expert index wins a tie
    w_b = softmax of the chosen g_b          or the chosen g_b divided by their sum
    L   = E * sum_e p_e f_e                  p_e mean probability, f_e share of items with e among their own k best

Source: Laser (Zhang et al., arXiv:2409.01605) for the routing; Switch Transformer (Fedus et al., arXiv:2101.03961,
eq. 4-6) for the loss. Pooling by the true length and counting only real items is our own choice, so that neither
depends on the padding or the composition of a batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.ops.backends import triton_serves
from laser_fast.ops.checks import check_count, check_dimensions, check_floating, check_one_device, remember_indices
from laser_fast.ops.operation import operation, wanted
from laser_fast.ops.precision import autocast_off, wide_dtype
from laser_fast.ops.segments import check_cu_seqlens, segment_ids, segment_mean, validate_cu_seqlens

WEIGHTINGS = ("softmax", "renormalize")


class Routing(NamedTuple):
    """Decision and statistics of one batch, in float32, or float64 where an input is float64.

    Attributes:
        expert: int32 [B, k], chosen experts, best first. No gradient.
        weight: [B, k], their weights, summing to 1 per user.
        pooled: [B, E], pooled probabilities per user, summing to 1. The batch's mean probability per expert is
            `(n_b * pooled).sum(0) / N`, gradient included, for a balance loss over several ranks.
        balance_loss: [], k when perfectly balanced, 0 without any item.
        load: [E], share of items with the expert among their own k best; sums to k. No gradient.
    """

    expert: Tensor
    weight: Tensor
    pooled: Tensor
    balance_loss: Tensor
    load: Tensor


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices [R, k] of the k largest entries per row of [R, E], best first, and the bool mask [R, E] of them."""
    # `max` promises the first index among equals, `topk` no order, and a stable sort is slower for so few experts
    remaining = values.clone()
    chosen = []
    for _ in range(k):
        index = remaining.max(dim=1, keepdim=True).indices
        remaining.scatter_(1, index, -torch.inf)
        chosen.append(index)
    return torch.cat(chosen, dim=1), remaining == -torch.inf


def _route(
    states: Tensor,
    router: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    top_k: int,
    *,
    weighting: str,
    expert: Tensor | None = None,
) -> tuple[Routing, Tensor]:
    """The routing, and the probabilities [N, E] of the items."""
    wide = wide_dtype(states, router, bias)
    with autocast_off(states.device):
        probabilities = F.linear(states.to(wide), router.to(wide), bias.to(wide)).softmax(dim=1)
    num_items, num_experts = probabilities.shape
    empty = (cu_seqlens.diff() == 0).unsqueeze(1)
    pooled = segment_mean(probabilities, cu_seqlens).masked_fill(empty, 1.0 / num_experts)
    if expert is None:
        expert = _largest(pooled.detach(), top_k)[0].int()
    chosen = pooled.gather(1, expert.long())
    weight = chosen.softmax(dim=1) if weighting == "softmax" else chosen / chosen.sum(dim=1, keepdim=True)
    votes = _largest(probabilities.detach(), top_k)[1].sum(dim=0)
    load = votes.to(probabilities.dtype) / max(num_items, 1)
    balance_loss = num_experts / max(num_items, 1) * torch.dot(probabilities.sum(dim=0), load)
    return Routing(expert, weight, pooled, balance_loss, load), probabilities


def route_experts_reference(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    top_k: int,
    *,
    weighting: str = "softmax",
    expert: Tensor | None = None,
) -> Routing:
    """`route_experts` in plain differentiable PyTorch; arguments are trusted.

    A decision `expert`, int32 [B, k], that was taken elsewhere is kept, so that two precisions compare.
    """
    return _route(states, weight, bias, cu_seqlens, top_k, weighting=weighting, expert=expert)[0]


@operation("laser_fast::route_experts")
def _route_experts(
    states: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, top_k: int, weighting: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiable results first; the last, the probabilities [N, E], is kept for backward."""
    validate_cu_seqlens("route_experts", cu_seqlens, states.shape[0])
    if triton_serves("route_experts", states, weight, bias, num_experts=weight.shape[0]):
        from laser_fast.kernels.routing import route_forward  # triton is needed only on a GPU

        return route_forward(states, weight, bias, cu_seqlens, top_k, weighting)
    routing, probabilities = _route(states, weight, bias, cu_seqlens, top_k, weighting=weighting)
    return routing.weight, routing.pooled, routing.balance_loss, routing.expert, routing.load, probabilities


@_route_experts.register_fake
def _(states: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, top_k: int, _: str) -> tuple[Tensor, ...]:
    num_items, num_experts, num_users = states.shape[0], weight.shape[0], cu_seqlens.shape[0] - 1
    wide = wide_dtype(states, weight, bias)
    shapes = ((num_users, top_k), (num_users, num_experts), (), (num_users, top_k), (num_experts,))
    dtypes = (wide, wide, wide, torch.int32, wide, wide)
    every = zip((*shapes, (num_items, num_experts)), dtypes, strict=True)
    return tuple(states.new_empty(shape, dtype=dtype) for shape, dtype in every)


@operation("laser_fast::route_experts_backward")
def _route_experts_backward(
    grad_weight: Tensor,
    grad_pooled: Tensor,
    grad_balance: Tensor,
    states: Tensor,
    router: Tensor,
    cu_seqlens: Tensor,
    expert: Tensor,
    weight: Tensor,
    pooled: Tensor,
    load: Tensor,
    probabilities: Tensor,
    weighting: str,
    needs_states: bool,
    needs_router: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """In the accumulation dtype but for states; what is not needed is empty."""
    # probabilities are float64 where any input of the forward pass was
    if triton_serves("route_experts", states, router, probabilities, num_experts=router.shape[0]):
        from laser_fast.kernels.routing import RoutingResult
        from laser_fast.kernels.routing_backward import route_backward

        result = RoutingResult(weight, pooled, grad_balance, expert, load, probabilities)
        grads, needs = (grad_weight, grad_pooled, grad_balance), (needs_states, needs_router)
        return route_backward(grads, states, router, cu_seqlens, result, weighting=weighting, needs=needs)
    num_items, num_experts = probabilities.shape
    # the weights' Jacobian, for both weightings: w (g - sum w g), divided by the chosen sum when renormalised
    inner = (grad_weight * weight).sum(dim=1, keepdim=True)
    if weighting == "softmax":
        grad_chosen = weight * (grad_weight - inner)
    else:
        grad_chosen = (grad_weight - inner) / pooled.gather(1, expert.long()).sum(dim=1, keepdim=True)
    # experts of one user differ, so the scatter never meets itself and stays deterministic
    grad_users = grad_pooled + torch.zeros_like(pooled).scatter(1, expert.long(), grad_chosen)
    grad_users = grad_users / cu_seqlens.diff().clamp_min(1).unsqueeze(1)
    grad = grad_users.index_select(0, segment_ids(cu_seqlens, num_items))
    grad += grad_balance * load * (num_experts / max(num_items, 1))
    grad -= (grad * probabilities).sum(dim=1, keepdim=True)
    grad *= probabilities
    with autocast_off(states.device):
        grad_states = (grad @ router.to(grad.dtype)).to(states.dtype) if needs_states else states.new_empty(0)
        grad_router = grad.T @ states.to(grad.dtype) if needs_router else grad.new_empty(0)
        grad_bias = grad.sum(dim=0)
    return grad_states, grad_router, grad_bias


@_route_experts_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    states, router, load, needs_states, needs_router = (arguments[place] for place in (3, 4, 9, 12, 13))
    grad_states = states.new_empty(states.shape if needs_states else (0,))
    return grad_states, load.new_empty(router.shape if needs_router else (0,)), load.new_empty(load.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, router, bias, cu_seqlens, _, weighting = inputs
    weight, pooled, _, expert, load, probabilities = output
    ctx.mark_non_differentiable(expert, load, probabilities)
    ctx.save_for_backward(states, router, cu_seqlens, expert, weight, pooled, load, probabilities)
    ctx.weighting, ctx.dtypes = weighting, (states.dtype, router.dtype, bias.dtype)


def _backward(ctx: Any, grad_weight: Tensor, grad_pooled: Tensor, grad_balance: Tensor, *_: Tensor) -> Any:
    needs = ctx.needs_input_grad[:3]
    grads = _route_experts_backward(
        grad_weight, grad_pooled, grad_balance, *ctx.saved_tensors, ctx.weighting, *needs[:2]
    )
    grads = [gradient.to(dtype) for gradient, dtype in zip(grads, ctx.dtypes, strict=True)]
    return *wanted(grads, needs), *(None,) * 3


_route_experts.register_autograd(_backward, setup_context=_setup_context)


def route_experts(
    states: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, top_k: int, *, weighting: str = "softmax"
) -> Routing:
    """Choose and weigh `top_k` experts per user from the packed item states (formula at the head of this file).

    All arithmetic is float32 whatever autocast says (float64 stays float64). Users are pooled in item order,
    independently of each other. Results are bit-equal from run to run; sums over the batch (`load`, `balance_loss`,
    gradients) only on devices with equally many multiprocessors. Backward keeps the states and the item probabilities,
    4 E bytes an item. Gradients pass through `weight`, `pooled` and `balance_loss`.

    Args:
        states: [N, D], floating point, any strides: items of all users, packed.
        weight: [E, D], floating point: router.
        bias: [E], floating point.
        cu_seqlens: int32 [B + 1], on the device of `states`; empty histories are allowed.
        top_k: experts per user, 1 to E.
        weighting: "softmax" over the chosen pooled probabilities, or "renormalize".
    """
    name = "route_experts"
    check_floating(name, states=states, weight=weight, bias=bias)
    check_dimensions(name, 2, states=states, weight=weight)
    check_dimensions(name, 1, bias=bias)
    check_one_device(name, states=states, weight=weight, bias=bias)
    check_cu_seqlens(name, cu_seqlens, states.device)
    num_experts = weight.shape[0]
    if weight.shape[1] != states.shape[1]:
        raise ValueError(
            f"{name}: states and weight must have one width, got {tuple(states.shape)} and {tuple(weight.shape)}"
        )
    if bias.shape[0] != num_experts:
        raise ValueError(f"{name}: bias must have one entry per expert ({num_experts}), got {bias.shape[0]}")
    check_count(name, top_k=top_k)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"{name}: top_k must be between 1 and the number of experts {num_experts}, got {top_k}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"{name}: weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    results = _route_experts(states, weight, bias, cu_seqlens, top_k, weighting)
    chosen_weight, pooled, balance_loss, chosen, load, _ = results
    remember_indices(chosen, num_experts)
    return Routing(chosen, chosen_weight, pooled, balance_loss, load)
