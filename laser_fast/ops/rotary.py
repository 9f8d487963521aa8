"""Rotary embedding of queries and keys: `x * cos + rotate_half(x) * sin` on the first R numbers of every head.

Backward is the transpose of this map, the same operation with other signs, exact also where the halves of cos and sin
differ.
Source: Su et al., arXiv:2104.09864, in the "rotate half" form of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laser_fast.ops.backends import triton_serves
from laser_fast.ops.checks import check_dimensions, check_dtype, check_floating, check_one_device
from laser_fast.ops.operation import operation
from laser_fast.ops.precision import wide_dtype

Rotated = tuple[Tensor, Tensor]


def rotary_embedding_reference(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool = False
) -> Rotated:
    """`rotary_embedding`, or its transpose, in plain differentiable PyTorch; arguments are trusted."""
    return _rotate(query, cos, sin, transposed), _rotate(key, cos, sin, transposed)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    half, wide = cos.shape[1] // 2, wide_dtype(x)
    first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    cos_first, cos_second = cos.to(wide)[:, None].chunk(2, dim=-1)
    sin_first, sin_second = sin.to(wide)[:, None].chunk(2, dim=-1)
    if transposed:
        sin_first, sin_second = -sin_second, -sin_first
    rotated = [first * cos_first - second * sin_first, second * cos_second + first * sin_second]
    return torch.cat([*(part.to(x.dtype) for part in rotated), x[..., 2 * half :]], dim=-1)


@operation("laser_fast::rotary_embedding")
def _rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    if triton_serves("rotary_embedding", query, key):
        from laser_fast.kernels.rotary import rotary  # triton is needed only on a GPU

        return rotary(query, key, cos, sin, transposed=transposed)
    return rotary_embedding_reference(query, key, cos, sin, transposed=transposed)


@_rotary_embedding.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> Rotated:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save_tables(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: Rotated) -> None:
    query, key, cos, sin, ctx.transposed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)
    ctx.shapes = query.shape, key.shape


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    there = [need and grad is not None for need, grad in zip(ctx.needs_input_grad, grads, strict=False)]
    like = next((grad for grad in grads if grad is not None), None)
    if like is None or not any(there):
        return None, None, None, None, None
    given = [
        # what is not needed has no heads
        grad if needed and grad is not None else like.new_empty(shape[0], 0, shape[2])
        for grad, needed, shape in zip(grads, there, ctx.shapes, strict=True)
    ]
    turned = _rotary_embedding(*given, *ctx.saved_tensors, not ctx.transposed)
    return *(x if needed else None for x, needed in zip(turned, there, strict=True)), None, None, None


_rotary_embedding.register_autograd(_backward, setup_context=_save_tables)


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Rotated:
    """Rotate queries and keys: `x * cos + rotate_half(x) * sin`, `rotate_half([x1; x2]) = [-x2; x1]`.

    Computed at least in float32 and rounded once. Gradients reach `query` and `key` alone; backward keeps the tables.

    Args:
        query: [T, H, d], floating point, any strides; H may be 0.
        key: [T, H_kv, d], dtype of `query`.
        cos: [T, R], floating point, R even and at most d: the first R numbers of a head are rotated, the others pass.
        sin: As `cos`.

    Returns:
        query and key, rotated, contiguous.
    """
    name = "rotary_embedding"
    check_floating(name, query=query, cos=cos, sin=sin)
    check_dtype(name, query.dtype, key=key)
    check_dimensions(name, 3, query=query, key=key)
    check_dimensions(name, 2, cos=cos, sin=sin)
    check_one_device(name, query=query, key=key, cos=cos, sin=sin)
    (num_tokens, _, head_size), width = query.shape, cos.shape[1]
    if (key.shape[0], key.shape[2]) != (num_tokens, head_size):
        found = f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise ValueError(f"{name}: query and key must agree in tokens and head size, got {found}")
    if cos.shape != sin.shape or cos.shape[0] != num_tokens:
        found = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(f"{name}: cos and sin must be [{num_tokens}, R], got {found}")
    if width % 2 or width > head_size:
        raise ValueError(f"{name}: cos must have an even width of at most {head_size}, got {width}")
    rotated: Rotated = _rotary_embedding(query, key, cos, sin, False)
    return rotated
