"""Rotary embedding of queries and keys in one launch (Su et al., arXiv:2104.09864, the "rotate half" form).

    [y1; y2] = [x1 cos1 - x2 sin1; x2 cos2 + x1 sin2]    transposed: [x1 cos1 + x2 sin2; x2 cos2 - x1 sin1]

x1 and x2 are the halves of the first R numbers of a head; the others pass. Memory-bound: every query and key is read
and written once, 10 KB each way for a token with 32 + 8 heads of 128 in half precision; the tables come from the cache.
Float32 inside, rounded once. The kernel is our own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of either half of a head in a program: 8 a lane, two loads of 16 bytes in half precision. Not yet timed.
_NUMBERS = 512
_NUM_WARPS = 2


@triton.jit
def _rotary_kernel(
    query_ptr,  # [T, H, d]
    key_ptr,  # [T, H_kv, d]
    cos_ptr,  # [T, R]
    sin_ptr,  # [T, R]
    query_out_ptr,  # [T, H, d], out
    key_out_ptr,  # [T, H_kv, d], out
    stride_query_token,
    stride_query_head,
    stride_key_token,
    stride_key_head,
    stride_cos_token,
    stride_sin_token,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # programs of one token follow each other, so that its row of the tables is read from memory once
    query_blocks: tl.constexpr = (NUM_QUERY_HEADS + BLOCK_H - 1) // BLOCK_H
    blocks: tl.constexpr = query_blocks + (NUM_KEY_HEADS + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    block_heads = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    if block < query_blocks:
        heads = block * BLOCK_H + block_heads
        is_head = heads < NUM_QUERY_HEADS
        from_heads = query_ptr + token * stride_query_token + heads * stride_query_head
        to_heads = query_out_ptr + (token * NUM_QUERY_HEADS + heads) * HEAD_SIZE
    else:
        heads = (block - query_blocks) * BLOCK_H + block_heads
        is_head = heads < NUM_KEY_HEADS
        from_heads = key_ptr + token * stride_key_token + heads * stride_key_head
        to_heads = key_out_ptr + (token * NUM_KEY_HEADS + heads) * HEAD_SIZE

    columns = tl.arange(0, BLOCK_HALF)
    mask = is_head & (columns < HALF)[None, :]
    first = tl.load(from_heads + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(from_heads + HALF + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    # tables spread over the heads have the layout of the tile: loads of 16 bytes, nothing through shared memory
    cos_row = tl.broadcast_to(cos_ptr + token * stride_cos_token + columns[None, :], (BLOCK_H, BLOCK_HALF))
    sin_row = tl.broadcast_to(sin_ptr + token * stride_sin_token + columns[None, :], (BLOCK_H, BLOCK_HALF))
    cos_first = tl.load(cos_row, mask=mask, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_row + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_row, mask=mask, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_row + HALF, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        to_first = first * cos_first + second * sin_second
        to_second = second * cos_second - first * sin_first
    else:
        to_first = first * cos_first - second * sin_first
        to_second = second * cos_second + first * sin_second
    dtype = query_out_ptr.dtype.element_ty
    tl.store(to_heads + columns[None, :], to_first.to(dtype), mask=mask)
    tl.store(to_heads + HALF + columns[None, :], to_second.to(dtype), mask=mask)
    if 2 * HALF < HEAD_SIZE:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        mask = is_head & (rest < HEAD_SIZE)[None, :]
        tl.store(to_heads + rest[None, :], tl.load(from_heads + rest[None, :], mask=mask, other=0.0), mask=mask)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Launch on query [T, H, d], key [T, H_kv, d] and tables [T, R], checked by the operation -> both, contiguous.

    Either may have no heads. Only what is not contiguous in the last dimension is copied.
    """
    query, key, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, cos, sin))
    (num_tokens, num_query_heads, head_size), num_key_heads = query.shape, key.shape[1]
    outputs = query.new_empty(query.shape), key.new_empty(key.shape)
    half = cos.shape[1] // 2
    block_half = triton.next_power_of_2(max(1, half))
    block_heads = max(1, _NUMBERS // block_half)
    blocks = triton.cdiv(num_query_heads, block_heads) + triton.cdiv(num_key_heads, block_heads)
    if num_tokens and blocks and head_size:
        with torch.cuda.device_of(query):
            _rotary_kernel[(num_tokens * blocks,)](
                *(query, key, cos, sin, *outputs),
                *(*query.stride()[:2], *key.stride()[:2], cos.stride(0), sin.stride(0)),
                NUM_QUERY_HEADS=num_query_heads,
                NUM_KEY_HEADS=num_key_heads,
                HEAD_SIZE=head_size,
                HALF=half,
                TRANSPOSED=transposed,
                BLOCK_H=block_heads,
                BLOCK_HALF=block_half,
                BLOCK_REST=triton.next_power_of_2(max(1, head_size - 2 * half)),
                num_warps=_NUM_WARPS,
            )
    return outputs
