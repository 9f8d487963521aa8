"""Prefix injection: P keys and values in front of every packed sequence, `out[b] = [prefix[b or 0]; text[b]]`.

Memory-bound: reads text and prefix once and writes T + B P rows of Hkv d numbers, for keys and for values. The copy is
exact in every dtype. Source: deep prompt tuning (Li and Liang, arXiv:2101.00190); packed layout: our own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laser_fast.ops import native
from laser_fast.ops.arguments import check_dimensions, check_dtype, check_one_device
from laser_fast.ops.precision import wide_dtype
from laser_fast.ops.segments import check_cu_seqlens, segment_ids, validate_cu_seqlens

Injected = tuple[Tensor, Tensor, Tensor]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INT32_MAX = 2**31 - 1


def _text_rows(cu_seqlens: Tensor, num_text_rows: int, prefix_length: int) -> Tensor:
    """Output row of every text token, int64 [T]: behind its own prefix and those of the sequences before."""
    sequence = segment_ids(cu_seqlens, num_text_rows)
    return torch.arange(num_text_rows, device=cu_seqlens.device) + (sequence + 1) * prefix_length


def _prefix_rows(cu_seqlens: Tensor, prefix_length: int) -> Tensor:
    """Output row of every prefix token, int64 [B P]."""
    begin = _output_cu_seqlens(cu_seqlens, prefix_length)[:-1].long()
    return (begin[:, None] + torch.arange(prefix_length, device=cu_seqlens.device)).reshape(-1)


def _output_cu_seqlens(cu_seqlens: Tensor, prefix_length: int) -> Tensor:
    steps = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device, dtype=torch.int32)
    return cu_seqlens + steps * prefix_length


def inject_prefix_kv_reference(
    key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, cu_seqlens: Tensor
) -> Injected:
    """`inject_prefix_kv` in plain differentiable PyTorch, on any device; arguments are trusted."""
    num_sequences, prefix_length = cu_seqlens.shape[0] - 1, prefix_key.shape[1]
    text_rows = _text_rows(cu_seqlens, key.shape[0], prefix_length)
    prefix_rows = _prefix_rows(cu_seqlens, prefix_length)

    def inject(text: Tensor, prefix: Tensor) -> Tensor:
        prefix = prefix.expand(num_sequences, *prefix.shape[1:]).reshape(prefix_rows.shape[0], *text.shape[1:])
        out = text.new_zeros(text.shape[0] + prefix.shape[0], *text.shape[1:])
        return out.index_copy(0, text_rows, text).index_copy(0, prefix_rows, prefix)

    return inject(key, prefix_key), inject(value, prefix_value), _output_cu_seqlens(cu_seqlens, prefix_length)


@torch.library.custom_op("laser_fast::inject_prefix_kv", mutates_args=())
def _inject_prefix_kv(
    key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return inject_prefix_kv_reference(key, value, prefix_key, prefix_value, cu_seqlens)


@_inject_prefix_kv.register_fake
def _(key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, cu_seqlens: Tensor) -> Injected:
    return _empty_outputs(key, prefix_key, cu_seqlens)


def _empty_outputs(key: Tensor, prefix_key: Tensor, cu_seqlens: Tensor) -> Injected:
    num_rows = key.shape[0] + (cu_seqlens.shape[0] - 1) * prefix_key.shape[1]
    shape = (num_rows, *key.shape[1:])
    return key.new_empty(shape), key.new_empty(shape), cu_seqlens.new_empty(cu_seqlens.shape)


def _run_compiled(function: Any, tensors: tuple[Tensor, ...]) -> Injected:
    inputs = [tensor.detach().contiguous() for tensor in tensors]  # DLPack takes no tensor that requires grad
    outputs = _empty_outputs(inputs[0], inputs[2], inputs[4])
    function(*inputs, *outputs)
    return outputs


@_inject_prefix_kv.register_kernel("cpu")
def _(key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, cu_seqlens: Tensor) -> Injected:
    tensors = (key, value, prefix_key, prefix_value, cu_seqlens)
    compiled = native.load_native().function("inject_prefix_kv_cpu")
    if compiled is not None:
        return _run_compiled(compiled, tensors)
    validate_cu_seqlens("inject_prefix_kv", cu_seqlens, key.shape[0])
    return inject_prefix_kv_reference(*tensors)


@_inject_prefix_kv.register_kernel("cuda")
def _(key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, cu_seqlens: Tensor) -> Injected:
    tensors = (key, value, prefix_key, prefix_value, cu_seqlens)
    absence = native.cuda_absence(key.device.index)
    if absence:
        native.warn_fallback("inject_prefix_kv", absence)
        return inject_prefix_kv_reference(*tensors)
    return _run_compiled(native.load_native().function("inject_prefix_kv_cuda"), tensors)


def _save_layout(ctx: Any, inputs: tuple[Tensor, ...], output: Injected) -> None:
    key, _, prefix_key, _, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.num_text_rows, ctx.prefix_shape = key.shape[0], prefix_key.shape


def _backward(
    ctx: Any, grad_key: Tensor, grad_value: Tensor, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
    (cu_seqlens,) = ctx.saved_tensors
    shape = ctx.prefix_shape
    need_key, need_value, need_prefix_key, need_prefix_value, _ = ctx.needs_input_grad
    text_rows = _text_rows(cu_seqlens, ctx.num_text_rows, shape[1])
    prefix_rows = _prefix_rows(cu_seqlens, shape[1])

    def of_prefix(grad: Tensor) -> Tensor:
        each = grad.index_select(0, prefix_rows).view(cu_seqlens.shape[0] - 1, *shape[1:])
        return each.sum(0, keepdim=True, dtype=wide_dtype(grad)).to(grad.dtype) if shape[0] == 1 else each

    return (
        grad_key.index_select(0, text_rows) if need_key else None,
        grad_value.index_select(0, text_rows) if need_value else None,
        of_prefix(grad_key) if need_prefix_key else None,
        of_prefix(grad_value) if need_prefix_value else None,
        None,
    )


_inject_prefix_kv.register_autograd(_backward, setup_context=_save_layout)


def inject_prefix_kv(
    key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, cu_seqlens: Tensor
) -> Injected:
    """Put P keys and values in front of every packed sequence.

    Deterministic, forward and backward; the gradient of a shared prefix is summed over sequences in float32. Backward
    keeps only `cu_seqlens`. On the CPU a malformed `cu_seqlens` is refused before anything is written; on a GPU its
    values are not read back, and malformed ones give wrong rows but no stray access.

    Args:
        key: [T, Hkv, d], fp16/bf16/fp32/fp64, any strides.
        value: [T, Hkv, d], as `key`.
        prefix_key: [B, P, Hkv, d] (one per sequence) or [1, P, Hkv, d] (shared), as `key`; P may be 0.
        prefix_value: As `prefix_key`.
        cu_seqlens: int32 [B + 1], from 0 to T; empty sequences are allowed.

    Returns:
        key and value [T + B P, Hkv, d], and their cu_seqlens int32 [B + 1].

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape or device does not fit, or (on the CPU) the values of `cu_seqlens`.
    """
    name = "inject_prefix_kv"
    if key.dtype not in _DTYPES:
        raise TypeError(f"{name}: key must be float16, bfloat16, float32 or float64, got {key.dtype}")
    check_dtype(name, key.dtype, value=value, prefix_key=prefix_key, prefix_value=prefix_value)
    check_dimensions(name, 3, key=key, value=value)
    check_dimensions(name, 4, prefix_key=prefix_key, prefix_value=prefix_value)
    check_one_device(name, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value)
    check_cu_seqlens(name, cu_seqlens, key.device)
    for what, one, other in (("key and value", key, value), ("prefix_key and prefix_value", prefix_key, prefix_value)):
        if one.shape != other.shape:
            raise ValueError(f"{name}: {what} must have one shape, got {tuple(one.shape)} and {tuple(other.shape)}")
    if prefix_key.shape[2:] != key.shape[1:]:
        found = f"{tuple(prefix_key.shape)} and {tuple(key.shape)}"
        raise ValueError(f"{name}: prefix_key and key must agree in heads and head width, got {found}")
    num_sequences = cu_seqlens.shape[0] - 1
    if prefix_key.shape[0] not in (1, num_sequences):
        raise ValueError(f"{name}: prefix_key must have 1 or B = {num_sequences} prefixes, got {prefix_key.shape[0]}")
    num_rows = key.shape[0] + num_sequences * prefix_key.shape[1]
    if num_rows > _INT32_MAX:
        raise ValueError(f"{name}: T + B P must fit in int32, got {num_rows}; split the batch")
    injected: Injected = _inject_prefix_kv(key, value, prefix_key, prefix_value, cu_seqlens)
    return injected
