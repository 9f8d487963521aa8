"""Rows of a prefix injection, forward and backward, in plain PyTorch: what its operations share.

Shapes of one half (keys or values): text [T, Hkv, d], prefix [S, P, Hkv, d], injected [T + B P, Hkv, d].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laser_fast.ops.contents import validate_indices
from laser_fast.ops.precision import wide_dtype
from laser_fast.ops.segments import lengthened_cu_seqlens, segment_ids, segment_sum, validate_cu_seqlens

Injected = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of key, value, prefix_key, prefix_value


def _text_rows(cu_seqlens: Tensor, num_text_rows: int, prefix_length: int) -> Tensor:
    """Output row of every text token, int64 [T]: behind its own prefix and those of the sequences before."""
    sequence = segment_ids(cu_seqlens, num_text_rows)
    return torch.arange(num_text_rows, device=cu_seqlens.device) + (sequence + 1) * prefix_length


def _prefix_rows(cu_seqlens: Tensor, prefix_length: int) -> Tensor:
    """Output row of every prefix token, int64 [B P]."""
    begin = output_cu_seqlens(cu_seqlens, prefix_length)[:-1].long()
    return (begin[:, None] + torch.arange(prefix_length, device=cu_seqlens.device)).reshape(-1)


def output_cu_seqlens(cu_seqlens: Tensor, prefix_length: int) -> Tensor:
    """Where every sequence starts once it has its prefix: int32 [B + 1]."""
    return lengthened_cu_seqlens(cu_seqlens, prefix_length)


def inject_rows(text: Tensor, prefix: Tensor, cu_seqlens: Tensor, prefix_index: Tensor | None) -> Tensor:
    """[..., T, Hkv, d] and [..., S, P, Hkv, d] -> [..., T + B P, Hkv, d], in plain differentiable PyTorch."""
    num_sequences, num_prefixes, prefix_length = cu_seqlens.shape[0] - 1, prefix.shape[-4], prefix.shape[-3]
    if prefix_index is None:
        each = prefix.expand(*prefix.shape[:-4], num_sequences, *prefix.shape[-3:])
    else:
        inside = (prefix_index >= 0) & (prefix_index < num_prefixes)
        each = prefix.index_select(-4, prefix_index.clamp(0, num_prefixes - 1))
        each = torch.where(inside.view(-1, 1, 1, 1), each, 0)
    rows = text.shape[-3] + num_sequences * prefix_length
    out = text.new_zeros(*text.shape[:-3], rows, *text.shape[-2:])
    out = out.index_copy(-3, _text_rows(cu_seqlens, text.shape[-3], prefix_length), text)
    return out.index_copy(-3, _prefix_rows(cu_seqlens, prefix_length), each.flatten(-4, -3))


def empty_outputs(key: Tensor, prefix_key: Tensor, cu_seqlens: Tensor) -> Injected:
    """What an injection writes; a leading layer dimension may stand in front of key and prefix."""
    num_rows = key.shape[-3] + (cu_seqlens.shape[0] - 1) * prefix_key.shape[-3]
    shape = (*key.shape[:-3], num_rows, *key.shape[-2:])
    return key.new_empty(shape), key.new_empty(shape), cu_seqlens.new_empty(cu_seqlens.shape)


def plain(tensor: Tensor | None) -> Tensor | None:
    """As the compiled library takes it: DLPack refuses a tensor that requires grad."""
    return None if tensor is None else tensor.detach().contiguous()


def validate_layout(name: str, cu_seqlens: Tensor, prefix_index: Tensor | None, sizes: tuple[int, int]) -> None:
    """The values of `cu_seqlens` (end: T) and of the slots (< S), without waiting (`contents`).

    Raises:
        ValueError: One of them does not fit.
    """
    num_text_rows, num_prefixes = sizes
    validate_cu_seqlens(name, cu_seqlens, num_text_rows)
    if prefix_index is not None:
        validate_indices(name, "prefix_index", prefix_index, num_prefixes)


def gather_rows(
    grad: Tensor, cu_seqlens: Tensor, prefix_index: Tensor | None, prefix_size: Sequence[int], needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of text and prefix from that of their injection, in plain PyTorch; what nobody needs has no rows.

    A prefix of several sequences gets their sum: deterministic, at least in float32, rounded once.
    """
    (num_prefixes, prefix_length), num_sequences = prefix_size, cu_seqlens.shape[0] - 1
    text, prefix = empty_gradient(grad, cu_seqlens, prefix_size, (False, False))
    if needs[0]:
        num_text_rows = grad.shape[0] - num_sequences * prefix_length
        text = grad.index_select(0, _text_rows(cu_seqlens, num_text_rows, prefix_length))
    if needs[1]:
        rows = grad.index_select(0, _prefix_rows(cu_seqlens, prefix_length))
        prefix = rows.view(num_sequences, prefix_length, *grad.shape[1:])
        if prefix_index is not None:
            inside = (prefix_index >= 0) & (prefix_index < num_prefixes)
            slots, order = torch.where(inside, prefix_index, num_prefixes).sort(stable=True)
            bounds = torch.searchsorted(slots, torch.arange(num_prefixes + 1, device=grad.device, dtype=slots.dtype))
            wide = prefix.to(wide_dtype(grad)).flatten(1)[order]
            prefix = segment_sum(wide, bounds.int()).to(grad.dtype).view(num_prefixes, *prefix.shape[1:])
        elif num_prefixes != num_sequences:
            prefix = prefix.sum(0, keepdim=True, dtype=wide_dtype(grad)).to(grad.dtype)
    return text, prefix


def empty_gradient(
    grad: Tensor, cu_seqlens: Tensor, prefix_size: Sequence[int], needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Room for the gradients of text and prefix; what nobody needs has no rows."""
    num_prefixes, prefix_length = prefix_size
    num_text_rows = grad.shape[0] - (cu_seqlens.shape[0] - 1) * prefix_length
    text = grad.new_empty(num_text_rows if needs[0] else 0, *grad.shape[1:])
    return text, grad.new_empty(num_prefixes if needs[1] else 0, prefix_length, *grad.shape[1:])


def empty_gradients(
    grads: tuple[Tensor | None, Tensor | None], cu_seqlens: Tensor, prefix_size: Sequence[int], needs: Sequence[bool]
) -> Gradients:
    """`empty_gradient` of keys and of values; `needs` is in the order of the result."""
    grad_key, grad_value = (next(g for g in (one, *grads) if g is not None) for one in grads)
    key, prefix_key = empty_gradient(grad_key, cu_seqlens, prefix_size, (needs[0], needs[2]))
    value, prefix_value = empty_gradient(grad_value, cu_seqlens, prefix_size, (needs[1], needs[3]))
    return key, value, prefix_key, prefix_value


def wanted(gradients: Gradients, needs: Sequence[bool]) -> list[Tensor | None]:
    """None in place of what nobody needs."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def gather_halves(
    grads: tuple[Tensor | None, Tensor | None],
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    prefix_size: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    """`gather_rows` of keys and of values; a half whose gradient is None needs nothing."""
    key, value, prefix_key, prefix_value = empty_gradients(grads, cu_seqlens, prefix_size, [False] * 4)
    if grads[0] is not None:
        key, prefix_key = gather_rows(grads[0], cu_seqlens, prefix_index, prefix_size, (needs[0], needs[2]))
    if grads[1] is not None:
        value, prefix_value = gather_rows(grads[1], cu_seqlens, prefix_index, prefix_size, (needs[1], needs[3]))
    return key, value, prefix_key, prefix_value


def gradients_needed(ctx: Any, grad_key: Tensor | None, grad_value: Tensor | None) -> list[bool]:
    """Of key, value, prefix_key and prefix_value: those that autograd asks for and that depend on anything."""
    given = [grad_key is not None, grad_value is not None] * 2
    return [need and there for need, there in zip(ctx.needs_input_grad[:4], given, strict=True)]


def filled(
    gradients: Sequence[Tensor | None], needs: Sequence[bool], shapes: tuple[Sequence[int], Sequence[int]]
) -> list[Tensor]:
    """Zeros in place of those that are missing or have no rows; `shapes` are those of text and of prefix."""
    like = next(tensor for tensor in gradients if tensor is not None)
    return [
        tensor if need and tensor is not None else like.new_zeros(tuple(shapes[index // 2]))
        for index, (tensor, need) in enumerate(zip(gradients, needs, strict=True))
    ]
