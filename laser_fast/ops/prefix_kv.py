"""Prefix injection: P keys and values in front of every packed sequence, `out[b] = [prefix[slot of b]; text[b]]`.

Shapes of one half (keys or values): text [T, Hkv, d], prefix [S, P, Hkv, d], injected [T + B P, Hkv, d].
Source: deep prompt tuning (Li and Liang, arXiv:2101.00190); packed layout: our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laser_fast.ops import backends
from laser_fast.ops.checks import INT32_MAX, check_dimensions, check_dtype, check_one_device, validate_indices
from laser_fast.ops.operation import operation, wanted
from laser_fast.ops.precision import wide_dtype
from laser_fast.ops.segments import (
    check_cu_seqlens,
    lengthened_cu_seqlens,
    segment_ids,
    segment_sum,
    validate_cu_seqlens,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Injected = tuple[Tensor, Tensor, Tensor]  # keys, values, cu_seqlens
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of key, value, prefix_key, prefix_value
Halves = tuple[Tensor | None, Tensor | None]  # gradients of injected keys and values, None where there is none


def _text_rows(cu_seqlens: Tensor, num_text_rows: int, prefix_length: int) -> Tensor:
    """Output row of every text token, int64 [T]."""
    sequence = segment_ids(cu_seqlens, num_text_rows)
    return torch.arange(num_text_rows, device=cu_seqlens.device) + (sequence + 1) * prefix_length


def _prefix_rows(cu_seqlens: Tensor, prefix_length: int) -> Tensor:
    """Output row of every prefix token, int64 [B P]."""
    begin = lengthened_cu_seqlens(cu_seqlens, prefix_length)[:-1].long()
    return (begin[:, None] + torch.arange(prefix_length, device=cu_seqlens.device)).reshape(-1)


def _inject_half(text: Tensor, prefix: Tensor, cu_seqlens: Tensor, prefix_index: Tensor | None) -> Tensor:
    num_sequences, (num_prefixes, prefix_length) = cu_seqlens.shape[0] - 1, prefix.shape[:2]
    if prefix_index is None:
        each = prefix.expand(num_sequences, *prefix.shape[1:])
    else:
        inside = (prefix_index >= 0) & (prefix_index < num_prefixes)
        each = prefix.index_select(0, prefix_index.clamp(0, num_prefixes - 1))
        each = torch.where(inside.view(-1, 1, 1, 1), each, 0)
    out = text.new_zeros(text.shape[0] + num_sequences * prefix_length, *text.shape[1:])
    out = out.index_copy(0, _text_rows(cu_seqlens, text.shape[0], prefix_length), text)
    return out.index_copy(0, _prefix_rows(cu_seqlens, prefix_length), each.flatten(0, 1))


def inject_prefix_kv_reference(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    *,
    prefix_index: Tensor | None = None,
) -> Injected:
    """`inject_prefix_kv` in plain differentiable PyTorch; arguments are trusted."""
    return (
        _inject_half(key, prefix_key, cu_seqlens, prefix_index),
        _inject_half(value, prefix_value, cu_seqlens, prefix_index),
        lengthened_cu_seqlens(cu_seqlens, prefix_key.shape[1]),
    )


def _plain(tensor: Tensor | None) -> Tensor | None:
    """As the compiled library takes it: DLPack refuses a tensor that requires grad."""
    return None if tensor is None else tensor.detach().contiguous()


@operation("laser_fast::inject_prefix_kv")
def _inject_prefix_kv(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    name, tensors = "inject_prefix_kv", (key, value, prefix_key, prefix_value, cu_seqlens)
    compiled = backends.compiled_operation(name, key.device)
    if compiled is None or key.device.type != "cpu":  # on the CPU the compiled code looks for itself
        validate_cu_seqlens(name, cu_seqlens, key.shape[0])
        if prefix_index is not None:
            validate_indices(name, "prefix_index", prefix_index, prefix_key.shape[0])
    if compiled is None:
        return inject_prefix_kv_reference(*tensors, prefix_index=prefix_index)
    outputs = _empty_outputs(key, value, prefix_key, prefix_value, cu_seqlens)
    compiled(*map(_plain, (*tensors, prefix_index)), *outputs)
    return outputs


@_inject_prefix_kv.register_fake
def _empty_outputs(key: Tensor, value: Tensor, prefix_key: Tensor, _: Tensor, cu_seqlens: Tensor, *__: Any) -> Injected:
    shape = (key.shape[0] + (cu_seqlens.shape[0] - 1) * prefix_key.shape[1], *key.shape[1:])
    return key.new_empty(shape), key.new_empty(shape), cu_seqlens.new_empty(cu_seqlens.shape)


def _gather_text(grad: Tensor, cu_seqlens: Tensor, _: Tensor | None, prefix_size: Sequence[int]) -> Tensor:
    num_text_rows = grad.shape[0] - (cu_seqlens.shape[0] - 1) * prefix_size[1]
    return grad.index_select(0, _text_rows(cu_seqlens, num_text_rows, prefix_size[1]))


def _gather_prefix(grad: Tensor, cu_seqlens: Tensor, prefix_index: Tensor | None, prefix_size: Sequence[int]) -> Tensor:
    """A prefix of several sequences gets their sum, in float32 at least and rounded once."""
    (num_prefixes, prefix_length), num_sequences = prefix_size, cu_seqlens.shape[0] - 1
    rows = grad.index_select(0, _prefix_rows(cu_seqlens, prefix_length))
    prefix = rows.view(num_sequences, prefix_length, *grad.shape[1:])
    if prefix_index is not None:
        inside = (prefix_index >= 0) & (prefix_index < num_prefixes)
        slots, order = torch.where(inside, prefix_index, num_prefixes).sort(stable=True)
        bounds = torch.searchsorted(slots, torch.arange(num_prefixes + 1, device=grad.device, dtype=slots.dtype))
        wide = prefix.to(wide_dtype(grad)).flatten(1)[order]
        return segment_sum(wide, bounds.int()).to(grad.dtype).view(num_prefixes, *prefix.shape[1:])
    if num_prefixes != num_sequences:
        return prefix.sum(0, keepdim=True, dtype=wide_dtype(grad)).to(grad.dtype)
    return prefix


@operation("laser_fast::inject_prefix_kv_backward")
def _inject_prefix_kv_backward(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key, value, prefix_key and prefix_value; what is not needed has no rows."""
    grads, layout = (grad_key, grad_value), (cu_seqlens, prefix_index, prefix_size)
    compiled = backends.compiled_operation("inject_prefix_kv_backward", cu_seqlens.device)
    if compiled is not None:
        gradients = _empty_gradients(*grads, *layout, needs)
        compiled(*map(_plain, (*grads, cu_seqlens, prefix_index)), *prefix_size, *wanted(gradients, needs))
        return gradients
    key, value, prefix_key, prefix_value = _empty_gradients(*grads, *layout, [False] * 4)
    if grad_key is not None:
        key = _gather_text(grad_key, *layout) if needs[0] else key
        prefix_key = _gather_prefix(grad_key, *layout) if needs[2] else prefix_key
    if grad_value is not None:
        value = _gather_text(grad_value, *layout) if needs[1] else value
        prefix_value = _gather_prefix(grad_value, *layout) if needs[3] else prefix_value
    return key, value, prefix_key, prefix_value


@_inject_prefix_kv_backward.register_fake
def _empty_gradients(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    cu_seqlens: Tensor,
    _: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    like, text, prefix = _shapes((grad_key, grad_value), cu_seqlens, prefix_size)

    def empty(shape: list[int], need: bool) -> Tensor:
        return like.new_empty(shape if need else [0, *shape[1:]])

    return empty(text, needs[0]), empty(text, needs[1]), empty(prefix, needs[2]), empty(prefix, needs[3])


def _shapes(grads: Halves, cu_seqlens: Tensor, prefix_size: Sequence[int]) -> tuple[Tensor, list[int], list[int]]:
    """A gradient that is there, and the shapes of text and of prefix."""
    like = next(grad for grad in grads if grad is not None)
    rows, *heads = like.shape
    return like, [rows - (cu_seqlens.shape[0] - 1) * prefix_size[1], *heads], [*prefix_size, *heads]


def _save_layout(ctx: Any, inputs: tuple[Any, ...], output: Injected) -> None:
    _, _, prefix_key, _, cu_seqlens, prefix_index = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens, prefix_index)
    ctx.prefix_size = prefix_key.shape[:2]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    given = [grad is not None for grad in (*grads[:2], *grads[:2])]
    needs = [need and there for need, there in zip(ctx.needs_input_grad[:4], given, strict=True)]
    if not any(needs):
        return (None,) * 6
    gradients = _inject_prefix_kv_backward(*grads[:2], *ctx.saved_tensors, ctx.prefix_size, needs)
    return (*wanted(gradients, needs), None, None)


def _save_gradient_layout(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
    grad_key, grad_value, cu_seqlens, prefix_index, prefix_size, ctx.needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens, prefix_index)
    _, *ctx.shapes = _shapes((grad_key, grad_value), cu_seqlens, prefix_size)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The transpose of a gather is the injection itself; zeros stand for what is missing or has no rows."""
    like = next((grad for grad in grads if grad is not None), None)
    if like is None:
        return (None,) * 6
    whole = [
        grad if need and grad is not None else like.new_zeros(ctx.shapes[index // 2])
        for index, (grad, need) in enumerate(zip(grads, ctx.needs, strict=True))
    ]
    injected = _inject_prefix_kv(*whole, *ctx.saved_tensors)[:2]
    return (*wanted(injected, ctx.needs_input_grad[:2]), *(None,) * 4)


_inject_prefix_kv.register_autograd(_backward, setup_context=_save_layout)
_inject_prefix_kv_backward.register_autograd(_double_backward, setup_context=_save_gradient_layout)


def _check_shapes(name: str, tensors: dict[str, Tensor], num_sequences: int, prefix_index: Tensor | None) -> None:
    key, value, prefix, prefix_value = tensors.values()
    for (one_name, one), (other_name, other) in (
        (("key", key), ("value", value)),
        (("prefix_key", prefix), ("prefix_value", prefix_value)),
    ):
        if one.shape != other.shape:
            found = f"{tuple(one.shape)} and {tuple(other.shape)}"
            raise ValueError(f"{name}: {one_name} and {other_name} must have one shape, got {found}")
    if prefix.shape[-2:] != key.shape[-2:]:
        found = f"{tuple(prefix.shape)} and {tuple(key.shape)}"
        raise ValueError(f"{name}: prefix_key and key must agree in heads and head width, got {found}")
    num_prefixes, prefix_length = prefix.shape[:2]
    if prefix_index is not None:
        if prefix_index.shape != (num_sequences,):
            found = f"{(num_sequences,)}, got {tuple(prefix_index.shape)}"
            raise ValueError(f"{name}: prefix_index must have shape [B] = {found}")
        if num_prefixes == 0:
            raise ValueError(f"{name}: prefix_key must hold at least 1 prefix where prefix_index is given, got 0")
    elif num_prefixes not in (1, num_sequences):
        rule = f"must have 1 or B = {num_sequences} prefixes"
        raise ValueError(f"{name}: prefix_key {rule}, got {num_prefixes}; a pool needs prefix_index")
    num_rows = key.shape[0] + num_sequences * prefix_length
    if num_rows > INT32_MAX:
        raise ValueError(f"{name}: T + B P must fit in int32, got {num_rows}; split the batch")


def inject_prefix_kv(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    *,
    prefix_index: Tensor | None = None,
) -> Injected:
    """Put P keys and values in front of every packed sequence: an exact copy in every dtype.

    Deterministic; the gradient of a prefix that several sequences take is their sum, in float32 (float64 for float64)
    and rounded once. Backward keeps only `cu_seqlens` and `prefix_index`. Malformed values of these two are refused
    before anything is written; those that only a GPU knows are checked there (`checks`), and no kernel follows them
    outside its tensors.

    Args:
        key: [T, Hkv, d], fp16/bf16/fp32/fp64, any strides.
        value: [T, Hkv, d], as `key`.
        prefix_key: [B, P, Hkv, d] (one per sequence) or [1, P, Hkv, d] (shared), as `key`; P may be 0. With
            `prefix_index` a pool [S, P, Hkv, d].
        prefix_value: As `prefix_key`.
        cu_seqlens: int32 [B + 1], from 0 to T; empty sequences are allowed.
        prefix_index: int32 [B], the prefix of the pool that each sequence takes; several may take the same.

    Returns:
        key and value [T + B P, Hkv, d], and their cu_seqlens int32 [B + 1].
    """
    name = "inject_prefix_kv"
    tensors = {"key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    if key.dtype not in _DTYPES:
        raise TypeError(f"{name}: key must be float16, bfloat16, float32 or float64, got {key.dtype}")
    check_dtype(name, key.dtype, **tensors)
    check_dimensions(name, 3, key=key, value=value)
    check_dimensions(name, 4, prefix_key=prefix_key, prefix_value=prefix_value)
    check_one_device(name, **tensors)
    check_cu_seqlens(name, cu_seqlens, key.device)
    if prefix_index is not None:
        check_dtype(name, torch.int32, prefix_index=prefix_index)
        check_one_device(name, cu_seqlens=cu_seqlens, prefix_index=prefix_index)
    _check_shapes(name, tensors, cu_seqlens.shape[0] - 1, prefix_index)
    injected: Injected = _inject_prefix_kv(*tensors.values(), cu_seqlens, prefix_index)
    return injected
