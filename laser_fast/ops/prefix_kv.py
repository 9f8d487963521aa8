"""Prefix injection: P keys and values in front of every packed sequence, `out[b] = [prefix[slot of b]; text[b]]`.

Memory-bound: reads text and prefix once and writes T + B P rows of Hkv d numbers, for keys and for values. The copy is
exact in every dtype. Source: deep prompt tuning (Li and Liang, arXiv:2101.00190); packed layout: our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laser_fast.ops import native
from laser_fast.ops.arguments import check_dimensions, check_dtype, check_one_device
from laser_fast.ops.contents import INT32_MAX
from laser_fast.ops.operation import operation
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
    validate_layout,
    wanted,
)
from laser_fast.ops.segments import check_cu_seqlens

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def inject_prefix_kv_reference(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    *,
    prefix_index: Tensor | None = None,
) -> Injected:
    """`inject_prefix_kv` in plain differentiable PyTorch, on any device; arguments are trusted."""
    return (
        inject_rows(key, prefix_key, cu_seqlens, prefix_index),
        inject_rows(value, prefix_value, cu_seqlens, prefix_index),
        output_cu_seqlens(cu_seqlens, prefix_key.shape[1]),
    )


@operation("laser_fast::inject_prefix_kv")
def _inject_prefix_kv(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return inject_prefix_kv_reference(key, value, prefix_key, prefix_value, cu_seqlens, prefix_index=prefix_index)


@_inject_prefix_kv.register_fake
def _(key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, cu_seqlens: Tensor, *_: Any) -> Injected:
    return empty_outputs(key, prefix_key, cu_seqlens)


@_inject_prefix_kv.register_kernel("cpu", "cuda")
def _(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None = None,
) -> Injected:
    tensors = (key, value, prefix_key, prefix_value, cu_seqlens)
    compiled = native.compiled_operation("inject_prefix_kv", key.device)
    if compiled is None or key.device.type != "cpu":  # on the CPU the compiled code looks for itself
        validate_layout("inject_prefix_kv", cu_seqlens, prefix_index, (key.shape[0], prefix_key.shape[0]))
    if compiled is not None:
        outputs = empty_outputs(key, prefix_key, cu_seqlens)
        compiled(*map(plain, (*tensors, prefix_index)), *outputs)
        return outputs
    return inject_prefix_kv_reference(*tensors, prefix_index=prefix_index)


@operation("laser_fast::inject_prefix_kv_backward")
def _inject_prefix_kv_backward(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return gather_halves((grad_key, grad_value), cu_seqlens, prefix_index, prefix_size, needs)


@_inject_prefix_kv_backward.register_fake
def _(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    return empty_gradients((grad_key, grad_value), cu_seqlens, prefix_size, needs)


@_inject_prefix_kv_backward.register_kernel("cpu", "cuda")
def _(
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    compiled = native.compiled_operation("inject_prefix_kv_backward", cu_seqlens.device)
    if compiled is None:
        return gather_halves((grad_key, grad_value), cu_seqlens, prefix_index, prefix_size, needs)
    gradients = empty_gradients((grad_key, grad_value), cu_seqlens, prefix_size, needs)
    tensors = map(plain, (grad_key, grad_value, cu_seqlens, prefix_index))
    compiled(*tensors, *prefix_size, *wanted(gradients, needs))
    return gradients


def _save_layout(ctx: Any, inputs: tuple[Any, ...], output: Injected) -> None:
    _, _, prefix_key, _, cu_seqlens, prefix_index = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens, prefix_index)
    ctx.prefix_size = prefix_key.shape[:2]


def _backward(
    ctx: Any, grad_key: Tensor | None, grad_value: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = gradients_needed(ctx, grad_key, grad_value)
    if not any(needs):
        return (None,) * 6
    gradients = _inject_prefix_kv_backward(grad_key, grad_value, *ctx.saved_tensors, ctx.prefix_size, needs)
    return (*wanted(gradients, needs), None, None)


def _save_gradient_layout(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
    grad_key, grad_value, cu_seqlens, prefix_index, prefix_size, ctx.needs = inputs
    rows, *heads = (grad_value if grad_key is None else grad_key).shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens, prefix_index)
    ctx.shapes = [rows - (cu_seqlens.shape[0] - 1) * prefix_size[1], *heads], [*prefix_size, *heads]


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The transpose of a gather is the injection itself."""
    if all(grad is None for grad in grads):
        return (None,) * 6
    key, value, _ = _inject_prefix_kv(*filled(grads, ctx.needs, ctx.shapes), *ctx.saved_tensors)
    needs = ctx.needs_input_grad
    return (key if needs[0] else None, value if needs[1] else None, None, None, None, None)


_inject_prefix_kv.register_autograd(_backward, setup_context=_save_layout)
_inject_prefix_kv_backward.register_autograd(_double_backward, setup_context=_save_gradient_layout)


def check_injection(
    name: str, tensors: dict[str, Tensor], cu_seqlens: Tensor, prefix_index: Tensor | None, *, layered: bool = False
) -> None:
    """Check the arguments of an injection: `tensors` are keys, values, prefix keys and prefix values, in this order.

    With `layered`, each has a leading dimension L.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape or device does not fit.
    """
    (key_name, key), (value_name, value), (prefix_name, prefix), _ = tensors.items()
    if key.dtype not in _DTYPES:
        raise TypeError(f"{name}: {key_name} must be float16, bfloat16, float32 or float64, got {key.dtype}")
    check_dtype(name, key.dtype, **tensors)
    extra = int(layered)
    check_dimensions(name, 3 + extra, **{key_name: key, value_name: value})
    check_dimensions(name, 4 + extra, **dict(list(tensors.items())[2:]))
    check_one_device(name, **tensors)
    check_cu_seqlens(name, cu_seqlens, key.device)
    for (one_name, one), (other_name, other) in zip(
        list(tensors.items())[::2], list(tensors.items())[1::2], strict=True
    ):
        if one.shape != other.shape:
            found = f"{tuple(one.shape)} and {tuple(other.shape)}"
            raise ValueError(f"{name}: {one_name} and {other_name} must have one shape, got {found}")
    if prefix.shape[-2:] != key.shape[-2:] or prefix.shape[:extra] != key.shape[:extra]:
        found = f"{tuple(prefix.shape)} and {tuple(key.shape)}"
        what = "layers, heads and head width" if layered else "heads and head width"
        raise ValueError(f"{name}: {prefix_name} and {key_name} must agree in {what}, got {found}")
    num_sequences, num_prefixes, prefix_length = cu_seqlens.shape[0] - 1, *prefix.shape[extra : extra + 2]
    if prefix_index is not None:
        _check_prefix_index(name, prefix_index, cu_seqlens)
        if num_prefixes == 0:
            raise ValueError(f"{name}: {prefix_name} must hold at least 1 prefix where prefix_index is given, got 0")
    elif num_prefixes not in (1, num_sequences):
        rule = f"must have 1 or B = {num_sequences} prefixes"
        raise ValueError(f"{name}: {prefix_name} {rule}, got {num_prefixes}; a pool needs prefix_index")
    num_rows = key.shape[extra] + num_sequences * prefix_length
    if num_rows > INT32_MAX:
        raise ValueError(f"{name}: T + B P must fit in int32, got {num_rows}; split the batch")


def _check_prefix_index(name: str, prefix_index: Tensor, cu_seqlens: Tensor) -> None:
    check_dtype(name, torch.int32, prefix_index=prefix_index)
    if prefix_index.shape != (cu_seqlens.shape[0] - 1,):
        wanted_shape, found = (cu_seqlens.shape[0] - 1,), tuple(prefix_index.shape)
        raise ValueError(f"{name}: prefix_index must have shape [B] = {wanted_shape}, got {found}")
    check_one_device(name, cu_seqlens=cu_seqlens, prefix_index=prefix_index)


def inject_prefix_kv(
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    *,
    prefix_index: Tensor | None = None,
) -> Injected:
    """Put P keys and values in front of every packed sequence.

    Deterministic, forward and backward; the gradient of a prefix that several sequences take is their sum, in float32
    (float64 for float64) and rounded once. Backward keeps only `cu_seqlens` and `prefix_index`. Malformed values of
    these two are refused before anything is written; on a GPU those that the host does not know are checked there
    (`contents`), and no kernel accesses what they point to outside its tensors.

    Args:
        key: [T, Hkv, d], fp16/bf16/fp32/fp64, any strides.
        value: [T, Hkv, d], as `key`.
        prefix_key: [B, P, Hkv, d] (one per sequence) or [1, P, Hkv, d] (shared), as `key`; P may be 0. With
            `prefix_index` a pool [S, P, Hkv, d].
        prefix_value: As `prefix_key`.
        cu_seqlens: int32 [B + 1], from 0 to T; empty sequences are allowed.
        prefix_index: int32 [B], the prefix of the pool that each sequence takes, several the same if they like.

    Returns:
        key and value [T + B P, Hkv, d], and their cu_seqlens int32 [B + 1].

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape or device does not fit, or the values of `cu_seqlens` or `prefix_index`.
    """
    tensors = {"key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    check_injection("inject_prefix_kv", tensors, cu_seqlens, prefix_index)
    injected: Injected = _inject_prefix_kv(key, value, prefix_key, prefix_value, cu_seqlens, prefix_index)
    return injected
