"""Cross-entropy over the whole catalogue, whose scores are never held at once.

    loss_b = log sum_i exp(s_bi) - s_b,target(b),     s_bi = cos(u_b, v_i) / temperature   (or u_b . v_i / temperature)

Forward walks over chunks of items with a running maximum and sum; backward computes each chunk's scores again.
Compute-bound: 2 B I d FLOPs forward, 4 to 6 B I d backward. Memory O(B d + chunk), and O(I d) for the items' gradient.
Source: the chunked form of Cut Cross-Entropy (Wijmans et al., arXiv:2411.09009), exact, as nothing is filtered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.ops.catalog import (
    check_catalog,
    chunk_scores,
    inverse_norms,
    item_chunks,
    locate,
    scaled_users,
    unit_rows,
)
from laser_fast.ops.checks import check_dimensions, check_dtype, check_one_device, validate_indices
from laser_fast.ops.operation import operation, wanted
from laser_fast.ops.precision import autocast_off, wide_dtype

REDUCTIONS = ("mean", "sum", "none")
# far below every score, yet finite: a chunk in which all is ignored adds nothing once another score was seen
_IGNORED = -1e30


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / max(losses.shape[0], 1) if reduction == "mean" else losses.sum()


def catalog_cross_entropy_reference(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    temperature: float,
    normalize: bool = True,
    reduction: str = "mean",
    ignored: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`catalog_cross_entropy` in plain differentiable PyTorch, holding all scores [B, I]; arguments are trusted."""
    wide = wide_dtype(users, items)
    users, items = users.to(wide), items.to(wide)
    if normalize:
        users, items = unit_rows(users), unit_rows(items)
    with autocast_off(users.device):
        scores = users @ items.T / temperature
        if ignored is not None:
            rows, places = ignored
            out = torch.zeros_like(scores, dtype=torch.bool)
            out[rows, places] = True
            scores = scores.masked_fill(out.scatter(1, target[:, None], False), -torch.inf)
        return _reduce(F.cross_entropy(scores, target, reduction="none"), reduction)


def _leave_out(scores: Tensor, rows: Tensor, ignored: Tensor, start: int) -> None:
    """Put the scores [B, chunk] of ignored items far below all others, in place."""
    column, inside = locate(ignored, start, scores.shape[1])
    lowered = torch.zeros_like(column, dtype=scores.dtype).masked_fill_(inside, _IGNORED)
    scores.index_put_((rows, column), lowered, accumulate=True)


@operation("laser_fast::catalog_cross_entropy")
def _catalog_cross_entropy(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    temperature: float,
    normalize: bool,
    rows: Tensor | None = None,
    ignored: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, largest score and sum of exp(score - largest) of every user, each [B]."""
    # the two are not folded into one log-sum-exp: at 20, a usual size, its rounding alone would cost exp() 16 eps
    validate_indices("catalog_cross_entropy", "target", target, items.shape[0])
    scaled = scaled_users(users, wide_dtype(users, items), temperature, normalize)
    peak = scaled.new_full((users.shape[0], 1), -torch.inf)
    total, target_score = torch.zeros_like(peak), torch.zeros_like(peak)
    with autocast_off(users.device):
        for start, scores in chunk_scores(scaled, items, normalize):
            if rows is not None and ignored is not None:
                _leave_out(scores, rows, ignored, start)
            column, inside = locate(target.unsqueeze(1), start, scores.shape[1])
            target_score += scores.gather(1, column).masked_fill(~inside, 0.0)
            before, peak = peak, torch.maximum(peak, scores.amax(dim=1, keepdim=True))
            total *= (before - peak).exp()
            total += scores.sub_(peak).exp_().sum(dim=1, keepdim=True)
    losses = total.log() + (peak - target_score)
    return losses.squeeze(1), peak.squeeze(1), total.squeeze(1)


@_catalog_cross_entropy.register_fake
def _(users: Tensor, items: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = users.new_empty(users.shape[0], dtype=wide_dtype(users, items))
    return losses, torch.empty_like(losses), torch.empty_like(losses)


def _through_norm(grad: Tensor, unit: Tensor) -> Tensor:
    """Remove from `grad` the part along the unit rows: their length does not change the cosine."""
    return grad - unit * (grad * unit).sum(dim=1, keepdim=True)


@operation("laser_fast::catalog_cross_entropy_backward")
def _catalog_cross_entropy_backward(
    grad: Tensor,
    users: Tensor,
    items: Tensor,
    target: Tensor,
    peak: Tensor,
    total: Tensor,
    temperature: float,
    normalize: bool,
    needs_users: bool,
    needs_items: bool,
    rows: Tensor | None = None,
    ignored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = peak.dtype
    scaled = scaled_users(users, wide, temperature, normalize)
    peak, total = peak.unsqueeze(1), total.unsqueeze(1)
    # a user's softmax is exp(score - peak) / total: the division, and grad, scale rows of width d instead of scores
    share = grad.unsqueeze(1) / total
    shared = scaled * share
    grad_scaled = torch.zeros_like(scaled)
    grad_items = items.new_empty(items.shape if needs_items else (0,))
    with autocast_off(users.device):
        for start, stop in item_chunks(users, items):
            chunk = items[start:stop].to(wide)
            inverse = inverse_norms(chunk, wide)
            scores = scaled @ chunk.T
            if normalize:
                scores *= inverse.T
            if rows is not None and ignored is not None:
                _leave_out(scores, rows, ignored, start)
            grad_scores = scores.sub_(peak).exp_()
            column, inside = locate(target.unsqueeze(1), start, stop - start)
            grad_scores.scatter_(1, column, grad_scores.gather(1, column) - total.masked_fill(~inside, 0.0))
            if normalize:
                grad_scores *= inverse.T
            if needs_users:
                grad_scaled.addmm_(grad_scores, chunk)
            if needs_items:
                grad_chunk = grad_scores.T @ shared
                grad_items[start:stop] = _through_norm(grad_chunk, chunk * inverse) if normalize else grad_chunk
    if not needs_users:
        return users.new_empty(0), grad_items
    grad_scaled *= share
    if normalize:
        inverse = inverse_norms(users, wide)
        grad_users = _through_norm(grad_scaled * (inverse / temperature), users.to(wide) * inverse)
    else:
        grad_users = grad_scaled / temperature
    return grad_users.to(users.dtype).contiguous(), grad_items  # transposed users give transposed products


@_catalog_cross_entropy_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    users, items, needs_users, needs_items = (arguments[place] for place in (1, 2, 8, 9))
    grad_users = users.new_empty(users.shape if needs_users else (0,))
    return grad_users, items.new_empty(items.shape if needs_items else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    users, items, target, ctx.temperature, ctx.normalize, rows, ignored = inputs
    _, peak, total = output
    ctx.mark_non_differentiable(peak, total)
    ctx.save_for_backward(users, items, target, peak, total, rows, ignored)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
    needs = ctx.needs_input_grad[:2]
    *saved, rows, ignored = ctx.saved_tensors
    grads = _catalog_cross_entropy_backward(grad, *saved, ctx.temperature, ctx.normalize, *needs, rows, ignored)
    return *wanted(grads, needs), *(None,) * 5


_catalog_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def _checked_ignored(
    ignored: tuple[Tensor, Tensor], users: Tensor, items: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The pairs to be left out; that of a user and its target is moved to where it does nothing."""
    name = "catalog_cross_entropy"
    rows, left_out = ignored
    check_dtype(name, torch.int64, ignored_rows=rows, ignored_items=left_out)
    check_dimensions(name, 1, ignored_rows=rows, ignored_items=left_out)
    check_one_device(name, users=users, ignored_rows=rows, ignored_items=left_out)
    if rows.shape != left_out.shape:
        raise ValueError(f"{name}: ignored must be pairs, got {rows.shape[0]} rows and {left_out.shape[0]} items")
    validate_indices(name, "ignored rows", rows, users.shape[0])
    validate_indices(name, "ignored items", left_out, items.shape[0])
    return rows, left_out.masked_fill(left_out == target[rows], -1)  # -1 lies in no chunk


def catalog_cross_entropy(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    temperature: float,
    normalize: bool = True,
    reduction: str = "mean",
    ignored: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Cross-entropy of each user's target among all items (formula at the head of this file).

    Accumulated in float32 whatever autocast says (float64 stays float64); gradients are rounded once. Deterministic.
    Backward keeps the inputs and two numbers per user. For a learned temperature, divide the unit-length users by it
    outside and pass `temperature=1.0, normalize=False`.

    Args:
        users: [B, d], floating point, any strides.
        items: [I, d], floating point, any strides, at least one row.
        target: int64 [B], values 0 to I - 1.
        temperature: positive number that divides the scores.
        normalize: True: cosine, where a zero row has cosine 0 and gradient 0; False: inner product.
        reduction: "mean" (0 for no user), "sum" or "none".
        ignored: (rows int64 [N], items int64 [N]), pairs of a user and an item that is left out of that user's sum; a
            user's target stays in.

    Returns:
        Scalar, or [B] for "none"; float32, or float64 where an input is float64.
    """
    name = "catalog_cross_entropy"
    check_catalog(name, users, items, temperature)
    check_dtype(name, torch.int64, target=target)
    check_dimensions(name, 1, target=target)
    check_one_device(name, users=users, items=items, target=target)
    if items.shape[0] == 0:
        raise ValueError(f"{name}: items must have at least one row, got {tuple(items.shape)}")
    if target.shape[0] != users.shape[0]:
        raise ValueError(f"{name}: target must have one entry per user ({users.shape[0]}), got {target.shape[0]}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    rows, left_out = (None, None) if ignored is None else _checked_ignored(ignored, users, items, target)
    losses, _, _ = _catalog_cross_entropy(users, items, target, float(temperature), normalize, rows, left_out)
    return _reduce(losses, reduction)
