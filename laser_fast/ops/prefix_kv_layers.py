"""Prefix injection of all layers of a model in one launch, for serving: keys and values are stacked by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laser_fast.ops import native
from laser_fast.ops.prefix_kv import check_injection
from laser_fast.ops.prefix_kv_rows import (
    Injected,
    empty_outputs,
    inject_rows,
    output_cu_seqlens,
    plain,
    validate_layout,
)


def inject_prefix_kv_layers_reference(
    keys: Tensor,
    values: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    cu_seqlens: Tensor,
    *,
    prefix_index: Tensor | None = None,
) -> Injected:
    """`inject_prefix_kv_layers` in plain PyTorch, on any device; arguments are trusted."""
    return (
        inject_rows(keys, prefix_keys, cu_seqlens, prefix_index),
        inject_rows(values, prefix_values, cu_seqlens, prefix_index),
        output_cu_seqlens(cu_seqlens, prefix_keys.shape[2]),
    )


@torch.library.custom_op("laser_fast::inject_prefix_kv_layers", mutates_args=())
def _inject_prefix_kv_layers(
    keys: Tensor,
    values: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (keys, values, prefix_keys, prefix_values, cu_seqlens)
    return inject_prefix_kv_layers_reference(*tensors, prefix_index=prefix_index)


@_inject_prefix_kv_layers.register_fake
def _(
    keys: Tensor, values: Tensor, prefix_keys: Tensor, prefix_values: Tensor, cu_seqlens: Tensor, *_: Any
) -> Injected:
    return empty_outputs(keys, prefix_keys, cu_seqlens)


@_inject_prefix_kv_layers.register_kernel(["cpu", "cuda"])
def _(
    keys: Tensor,
    values: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None = None,
) -> Injected:
    tensors = (keys, values, prefix_keys, prefix_values, cu_seqlens)
    compiled = native.compiled_operation("inject_prefix_kv_layers", keys.device)
    if compiled is None or keys.device.type != "cpu":  # on the CPU the compiled code looks for itself
        validate_layout("inject_prefix_kv_layers", cu_seqlens, prefix_index, (keys.shape[1], prefix_keys.shape[1]))
    if compiled is not None:
        outputs = empty_outputs(keys, prefix_keys, cu_seqlens)
        compiled(*map(plain, (*tensors, prefix_index)), *outputs)
        return outputs
    return inject_prefix_kv_layers_reference(*tensors, prefix_index=prefix_index)


def inject_prefix_kv_layers(
    keys: Tensor,
    values: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    cu_seqlens: Tensor,
    *,
    prefix_index: Tensor | None = None,
) -> Injected:
    """`inject_prefix_kv` of L layers at once, without a gradient.

    Args:
        keys: [L, T, Hkv, d], fp16/bf16/fp32/fp64, any strides.
        values: [L, T, Hkv, d], as `keys`.
        prefix_keys: [L, B, P, Hkv, d], [L, 1, P, Hkv, d], or with `prefix_index` a pool [L, S, P, Hkv, d].
        prefix_values: As `prefix_keys`.
        cu_seqlens: int32 [B + 1], from 0 to T, the same in every layer.
        prefix_index: int32 [B], the prefix of the pool that each sequence takes.

    Returns:
        keys and values [L, T + B P, Hkv, d], and their cu_seqlens int32 [B + 1].

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape or device does not fit, an input requires a gradient while gradients are recorded, or the
            values of `cu_seqlens` or `prefix_index` do not fit (on a GPU as in `inject_prefix_kv`).
    """
    name = "inject_prefix_kv_layers"
    tensors = {"keys": keys, "values": values, "prefix_keys": prefix_keys, "prefix_values": prefix_values}
    check_injection(name, tensors, cu_seqlens, prefix_index, layered=True)
    for tensor_name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            remedy = "use torch.no_grad, or inject_prefix_kv layer by layer"
            raise ValueError(f"{name}: {tensor_name} must not require a gradient, got one that does; {remedy}")
    injected: Injected = _inject_prefix_kv_layers(*tensors.values(), cu_seqlens, prefix_index)
    return injected
