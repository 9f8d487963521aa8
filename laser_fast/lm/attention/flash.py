"""The fast backends of packed attention on a GPU: the package flash-attn, or the FlashAttention inside torch.

Both align a causal mask at the last query and the last key, so every token sees the whole of an injected prefix.
Torch's kernels are called as `aten::_flash_attention_forward`, the operation below `torch.nn.attention.varlen`. That
function has other arguments in every release (2.10, 2.11, 2.12) and no dropout; the operation has a derivative,
dropout, windows and grouped queries in all of them.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_OLDEST = (8, 0)
_LARGEST_HEAD = 256
_HALF = (torch.float16, torch.bfloat16)
# what we pass, in the order of torch 2.11 to 2.13
_ATEN_ARGUMENTS = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
    *("return_debug_mask", "scale", "window_size_left", "window_size_right"),
)

BUCKETS = "buckets"
FLASH_ATTN = "flash-attn"
TORCH_FLASH = "torch flash"
TORCH_FLASH_EXPANDED = "torch flash, keys expanded"


class PackedLengths(NamedTuple):
    """Where sequences start, and how many tokens the longest has, in the order in which kernels take them."""

    cu_seqlens_q: Tensor  # int32 [B+1]
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int


@dataclass(frozen=True)
class AttentionKind:
    """What an attention computes, see `varlen_attention`."""

    causal: bool
    scale: float
    sliding_window: int | None = None
    dropout: float = 0.0
    softcap: float | None = None

    @property
    def window(self) -> tuple[int, int]:
        """Keys to the left and right of its own that a query sees; -1 = all."""
        side = -1 if self.sliding_window is None else self.sliding_window - 1
        return side, 0 if self.causal else side


Backend = Callable[[Tensor, Tensor, Tensor, PackedLengths, AttentionKind], Tensor]


@cache
def flash_attn_function() -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of the package flash-attn; None where it is not installed or does not load."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        found: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, OSError, AttributeError):  # built for another torch
        return None
    return found


@cache
def torch_flash_function() -> Callable[..., Any] | None:
    """`aten::_flash_attention_forward`; None where this torch has none or takes other arguments."""
    operation = getattr(torch.ops.aten, "_flash_attention_forward", None)
    return operation if operation is not None and takes_our_arguments(operation.default._schema) else None


def takes_our_arguments(schema: Any) -> bool:
    """Whether an operation of this schema takes what we pass, and all its other arguments have defaults."""
    own = len(_ATEN_ARGUMENTS)
    names = tuple(argument.name for argument in schema.arguments)
    return names[:own] == _ATEN_ARGUMENTS and all(rest.has_default_value() for rest in schema.arguments[own:])


def choose_backend(query: Tensor, key: Tensor, kind: AttentionKind, *, has_sinks: bool) -> tuple[str, Backend | None]:
    """Name and function of the backend for these tensors; `BUCKETS` and None where no fast one serves them."""
    fits = query.is_cuda and query.dtype in _HALF and query.shape[2] <= _LARGEST_HEAD and query.shape[2] % 8 == 0
    if not fits or has_sinks or torch.cuda.get_device_capability(query.device) < _OLDEST:
        return BUCKETS, None
    return choose_fast(kind, query.device, grouped=query.shape[1] != key.shape[1])


def choose_fast(kind: AttentionKind, device: torch.device, *, grouped: bool) -> tuple[str, Backend | None]:
    """The same for any tensors that a fast backend takes."""
    if flash_attn_function() is not None:
        return FLASH_ATTN, _run_flash_attn
    if torch_flash_function() is None or kind.softcap is not None:
        return BUCKETS, None
    if grouped and not takes_grouped_queries(device):
        return TORCH_FLASH_EXPANDED, _run_expanded
    return TORCH_FLASH, _run_torch_flash


@cache
def takes_grouped_queries(device: torch.device) -> bool:
    """Whether torch's kernels take fewer heads of keys than of queries: tried once per device, forward and backward.

    The trial has a sequence of one query, and one of more keys than queries.
    """
    lengths_q, lengths_k, heads, groups, head_size = [1, 6], [9, 6], 4, 2, 64
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, head_size, generator=generator).to(device, torch.float16)

    def run(backend: Backend) -> list[Tensor]:
        q, k, v = (tensor.clone().requires_grad_() for tensor in (query, key, value))
        output = backend(q, k, v, lengths, kind)
        return [output, *torch.autograd.grad(output, (q, k, v), probe)]

    # tensors made in inference mode cannot be kept for backward
    with torch.inference_mode(False), torch.enable_grad():
        query, probe = draw(sum(lengths_q), heads), draw(sum(lengths_q), heads)
        key, value = draw(sum(lengths_k), heads // groups), draw(sum(lengths_k), heads // groups)
        bounds = [torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (lengths_q, lengths_k)]
        lengths = PackedLengths(bounds[0], bounds[1], max(lengths_q), max(lengths_k))
        kind = AttentionKind(causal=True, scale=head_size**-0.5)
        expected = run(_run_expanded)
        try:
            found = run(_run_torch_flash)
        except (RuntimeError, ValueError):  # refused; a kernel that fails on the device fails later
            return False
    return all(torch.allclose(one, other, rtol=1e-2, atol=1e-2) for one, other in zip(found, expected, strict=True))


def _run_flash_attn(query: Tensor, key: Tensor, value: Tensor, lengths: PackedLengths, kind: AttentionKind) -> Tensor:
    function = flash_attn_function()
    assert function is not None
    window = kind.window if kind.sliding_window is not None else (-1, -1)
    options = {"dropout_p": kind.dropout, "softmax_scale": kind.scale, "softcap": kind.softcap or 0.0}
    output: Tensor = function(query, key, value, *lengths, causal=kind.causal, window_size=window, **options)
    return output


def _run_torch_flash(query: Tensor, key: Tensor, value: Tensor, lengths: PackedLengths, kind: AttentionKind) -> Tensor:
    function = torch_flash_function()
    assert function is not None
    left, right = kind.window
    # the causal flag takes no window beside it; a window without keys to the right is the same mask
    causal = kind.causal and kind.sliding_window is None
    window = {"window_size_left": left, "window_size_right": right}
    output: Tensor = function(query, key, value, *lengths, kind.dropout, causal, False, scale=kind.scale, **window)[0]
    return output


def _run_expanded(query: Tensor, key: Tensor, value: Tensor, lengths: PackedLengths, kind: AttentionKind) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return _run_torch_flash(query, key, value, lengths, kind)
