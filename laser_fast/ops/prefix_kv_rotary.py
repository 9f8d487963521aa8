"""Prefix injection that rotates the text keys on their way: the rotary embedding rides on a copy that is done anyway.

Source: Su et al., arXiv:2104.09864, in the "rotate half" form of transformers; the fusion with the copy is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laser_fast.ops import native
from laser_fast.ops.arguments import check_dtype, check_one_device
from laser_fast.ops.precision import wide_dtype
from laser_fast.ops.prefix_kv import check_injection
from laser_fast.ops.prefix_kv_rows import (
    Gradients,
    Injected,
    empty_gradients,
    empty_outputs,
    filled,
    gather_halves,
    gradients_needed,
    inject_rows,
    output_cu_seqlens,
    plain,
    validate_offsets,
    wanted,
)


def _rotate(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`key * cos + rotate_half(key) * sin` for key [T, Hkv, d]; at least in float32, rounded once."""
    wide = wide_dtype(key)
    first, second = key.to(wide).chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    return (key.to(wide) * cos.to(wide)[:, None] + half * sin.to(wide)[:, None]).to(key.dtype)


def _rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `_rotate`."""
    wide = wide_dtype(grad)
    first, second = (grad.to(wide) * sin.to(wide)[:, None]).chunk(2, dim=-1)
    half = torch.cat([second, -first], dim=-1)
    return (grad.to(wide) * cos.to(wide)[:, None] + half).to(grad.dtype)


def inject_prefix_kv_rotary_reference(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    prefix_index: Tensor | None = None,
) -> Injected:
    """`inject_prefix_kv_rotary` in plain differentiable PyTorch, on any device; arguments are trusted."""
    return (
        inject_rows(_rotate(key, cos, sin), prefix_key, cu_seqlens, prefix_index),
        inject_rows(value, prefix_value, cu_seqlens, prefix_index),
        output_cu_seqlens(cu_seqlens, prefix_key.shape[1]),
    )


@torch.library.custom_op("laser_fast::inject_prefix_kv_rotary", mutates_args=())
def _inject_prefix_kv_rotary(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    cos: Tensor,
    sin: Tensor,
    prefix_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (key, value, prefix_key, prefix_value, cu_seqlens, cos, sin)
    return inject_prefix_kv_rotary_reference(*tensors, prefix_index=prefix_index)


@_inject_prefix_kv_rotary.register_fake
def _(key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, cu_seqlens: Tensor, *_: Any) -> Injected:
    return empty_outputs(key, prefix_key, cu_seqlens)


@_inject_prefix_kv_rotary.register_kernel(["cpu", "cuda"])
def _(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    cos: Tensor,
    sin: Tensor,
    prefix_index: Tensor | None = None,
) -> Injected:
    tensors = (key, value, prefix_key, prefix_value, cu_seqlens, cos, sin)
    compiled = native.compiled_operation("inject_prefix_kv_rotary", key.device)
    if compiled is not None:
        outputs = empty_outputs(key, prefix_key, cu_seqlens)
        compiled(*map(plain, (*tensors, prefix_index)), *outputs)
        return outputs
    if key.device.type == "cpu":
        validate_offsets("inject_prefix_kv_rotary", cu_seqlens, prefix_index, (key.shape[0], prefix_key.shape[0]))
    return inject_prefix_kv_rotary_reference(*tensors, prefix_index=prefix_index)


def _gather_reference(
    grads: tuple[Tensor | None, Tensor | None],
    cu_seqlens: Tensor,
    tables: tuple[Tensor, Tensor],
    prefix_index: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    key, value, prefix_key, prefix_value = gather_halves(grads, cu_seqlens, prefix_index, prefix_size, needs)
    return _rotate_back(key, *tables) if needs[0] else key, value, prefix_key, prefix_value


@torch.library.custom_op("laser_fast::inject_prefix_kv_rotary_backward", mutates_args=())
def _inject_prefix_kv_rotary_backward(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    cu_seqlens: Tensor,
    cos: Tensor,
    sin: Tensor,
    prefix_index: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gather_reference((grad_key, grad_value), cu_seqlens, (cos, sin), prefix_index, prefix_size, needs)


@_inject_prefix_kv_rotary_backward.register_fake
def _(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    cu_seqlens: Tensor,
    cos: Tensor,
    sin: Tensor,
    prefix_index: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    return empty_gradients((grad_key, grad_value), cu_seqlens, prefix_size, needs)


@_inject_prefix_kv_rotary_backward.register_kernel(["cpu", "cuda"])
def _(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    cu_seqlens: Tensor,
    cos: Tensor,
    sin: Tensor,
    prefix_index: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    compiled = native.compiled_operation("inject_prefix_kv_rotary_backward", cu_seqlens.device)
    if compiled is None:
        return _gather_reference((grad_key, grad_value), cu_seqlens, (cos, sin), prefix_index, prefix_size, needs)
    gradients = empty_gradients((grad_key, grad_value), cu_seqlens, prefix_size, needs)
    tensors = map(plain, (grad_key, grad_value, cu_seqlens, cos, sin, prefix_index))
    compiled(*tensors, *prefix_size, *wanted(gradients, needs))
    return gradients


def _save_layout(ctx: Any, inputs: tuple[Any, ...], output: Injected) -> None:
    _, _, prefix_key, _, cu_seqlens, cos, sin, prefix_index = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens, cos, sin, prefix_index)
    ctx.prefix_size = prefix_key.shape[:2]


def _backward(
    ctx: Any, grad_key: Tensor | None, grad_value: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = gradients_needed(ctx, grad_key, grad_value)
    if not any(needs):
        return (None,) * 8
    gradients = _inject_prefix_kv_rotary_backward(grad_key, grad_value, *ctx.saved_tensors, ctx.prefix_size, needs)
    return (*wanted(gradients, needs), None, None, None, None)


def _save_gradient_layout(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
    grad_key, grad_value, cu_seqlens, cos, sin, prefix_index, prefix_size, ctx.needs = inputs
    heads = (grad_value if grad_key is None else grad_key).shape[1:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens, cos, sin, prefix_index)
    ctx.shapes = [cos.shape[0], *heads], [*prefix_size, *heads]


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The transpose of a gather that rotates back is the injection that rotates."""
    if all(grad is None for grad in grads):
        return (None,) * 8
    key, value, _ = _inject_prefix_kv_rotary(*filled(grads, ctx.needs, ctx.shapes), *ctx.saved_tensors)
    needs = ctx.needs_input_grad
    return (key if needs[0] else None, value if needs[1] else None, *[None] * 6)


_inject_prefix_kv_rotary.register_autograd(_backward, setup_context=_save_layout)
_inject_prefix_kv_rotary_backward.register_autograd(_double_backward, setup_context=_save_gradient_layout)


def _check_tables(name: str, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    if key.shape[2] % 2:
        raise ValueError(f"{name}: key must have an even head size, got {key.shape[2]}")
    if cos.dtype not in (torch.float32, key.dtype):
        raise TypeError(f"{name}: cos must be torch.float32 or {key.dtype}, got {cos.dtype}")
    check_dtype(name, cos.dtype, sin=sin)
    shape = key.shape[0], key.shape[2]
    for table_name, table in (("cos", cos), ("sin", sin)):
        if table.shape != shape:
            raise ValueError(f"{name}: {table_name} must have shape [T, d] = {shape}, got {tuple(table.shape)}")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: {table_name} must not require a gradient, got one that does; detach it")
    check_one_device(name, key=key, cos=cos, sin=sin)


def inject_prefix_kv_rotary(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    prefix_index: Tensor | None = None,
) -> Injected:
    """`inject_prefix_kv` of `key * cos + rotate_half(key) * sin`: the text keys are rotated, the prefix keys are not.

    Prefix keys come rotated already, or are not to be rotated. Rotated in float32 (float64 for float64) and rounded
    once; the gradient of `key` is rotated back in its gather. Everything else as in `inject_prefix_kv`.

    For models that hand over keys before their rotary embedding. The models of transformers rotate before they call
    the attention, so `FrozenLM` uses `inject_prefix_kv`.

    Args:
        key: [T, Hkv, d], d even, not rotated.
        value: [T, Hkv, d].
        prefix_key: [B, P, Hkv, d], [1, P, Hkv, d], or with `prefix_index` a pool [S, P, Hkv, d].
        prefix_value: As `prefix_key`.
        cu_seqlens: int32 [B + 1], from 0 to T.
        cos: [T, d], of every text token, float32 or as `key`; gets no gradient.
        sin: As `cos`. `rotate_half(x) = [-x[d / 2:]; x[:d / 2]]`.
        prefix_index: int32 [B], the prefix of the pool that each sequence takes.

    Returns:
        key and value [T + B P, Hkv, d], and their cu_seqlens int32 [B + 1].

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape or device does not fit, `cos` or `sin` requires a gradient, or (on the CPU) the values of
            `cu_seqlens` or `prefix_index` do not fit.
    """
    name = "inject_prefix_kv_rotary"
    tensors = {"key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    check_injection(name, tensors, cu_seqlens, prefix_index)
    _check_tables(name, key, cos, sin)
    injected: Injected = _inject_prefix_kv_rotary(*tensors.values(), cu_seqlens, cos, sin, prefix_index)
    return injected
