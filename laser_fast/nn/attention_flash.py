"""The fast backends of packed attention on a GPU: the package flash-attn, or the FlashAttention inside torch.

Both take packed sequences as they are and align a causal mask at the last query and the last key, which lets every
token see the whole of an injected prefix. torch's function (`torch.nn.attention.varlen`, since 2.10) changed its
arguments between releases, so they are looked up, never assumed.
"""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

_OLDEST = (8, 0)
_LARGEST_HEAD = 256


@dataclass(frozen=True)
class PackedLengths:
    """Where sequences start, and the longest of them.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 [B+1].
        longest_q, longest_k: tokens.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int


@dataclass(frozen=True)
class AttentionKind:
    """What an attention computes besides its inputs; see `laser_fast.nn.attention.varlen_attention`."""

    causal: bool
    scale: float
    sliding_window: int | None = None
    dropout: float = 0.0
    softcap: float | None = None

    @property
    def window(self) -> tuple[int, int]:
        """Keys to the left and right of its own that a query sees, -1 = all: a window of w counts the own key."""
        side = -1 if self.sliding_window is None else self.sliding_window - 1
        return side, 0 if self.causal else side


Backend = Callable[[Tensor, Tensor, Tensor, PackedLengths, AttentionKind], Tensor]


@cache
def flash_attn_function() -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of the package flash-attn, None where it is not installed or does not load."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        found: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, OSError, AttributeError):  # built for another torch
        return None
    return found


@cache
def torch_varlen_function() -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn`, None where this torch has none."""
    try:
        found: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return found


def choose_backend(query: Tensor, key: Tensor, kind: AttentionKind, *, has_sinks: bool) -> tuple[str, Backend | None]:
    """Name and function of the backend for these tensors; "buckets" and None where no fast one can serve them."""
    narrow = query.dtype in (torch.float16, torch.bfloat16)
    if not query.is_cuda or not narrow or has_sinks or query.shape[2] > _LARGEST_HEAD or query.shape[2] % 8:
        return "buckets", None
    if torch.cuda.get_device_capability(query.device) < _OLDEST:
        return "buckets", None
    return choose_fast(kind, grouped=query.shape[1] != key.shape[1])


def choose_fast(kind: AttentionKind, *, grouped: bool) -> tuple[str, Backend | None]:
    """The fast backend that computes this kind of attention, whatever the tensors."""
    if flash_attn_function() is not None:
        return "flash-attn", _run_flash_attn
    function = torch_varlen_function()
    if function is None or kind.dropout or kind.softcap is not None:
        return "buckets", None
    known = inspect.signature(function).parameters
    needs_window = kind.sliding_window is not None or (kind.causal and "is_causal" not in known)
    if (needs_window and "window_size" not in known) or (grouped and "enable_gqa" not in known):
        return "buckets", None
    return "torch varlen", _run_torch_varlen


def _run_flash_attn(query: Tensor, key: Tensor, value: Tensor, lengths: PackedLengths, kind: AttentionKind) -> Tensor:
    function = flash_attn_function()
    assert function is not None
    output: Tensor = function(
        query,
        key,
        value,
        lengths.cu_seqlens_q,
        lengths.cu_seqlens_k,
        lengths.longest_q,
        lengths.longest_k,
        dropout_p=kind.dropout,
        softmax_scale=kind.scale,
        causal=kind.causal,
        window_size=kind.window if kind.sliding_window is not None else (-1, -1),
        softcap=kind.softcap or 0.0,
    )
    return output


def _run_torch_varlen(query: Tensor, key: Tensor, value: Tensor, lengths: PackedLengths, kind: AttentionKind) -> Tensor:
    function = torch_varlen_function()
    assert function is not None
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = kind.scale
    else:  # it divides by the root of the head size on its own
        query = query * (kind.scale * math.sqrt(query.shape[2]))
    if "is_causal" in known and kind.sliding_window is None:
        options["is_causal"] = kind.causal
    elif kind.causal or kind.sliding_window is not None:
        options["window_size"] = kind.window
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    bounds = (lengths.cu_seqlens_q, lengths.cu_seqlens_k, lengths.longest_q, lengths.longest_k)
    output: Tensor = function(query, key, value, *bounds, **options)
    return output
