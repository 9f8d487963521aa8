"""The attention "laser_varlen", which transformers calls in place of a model's own.

All sequences of a batch run as one row [1, T]. The layout of the batch that this thread runs says where each starts.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from laser_fast.lm.packed_layout import PackedLayout

ATTENTION_NAME = "laser_varlen"
# options of transformers that change the result and that the packed attention does not have
_REFUSED_OPTIONS = {"position_bias": "a position bias", "head_mask": "a head mask"}
_running = threading.local()


def register_attention() -> None:
    """Make "laser_varlen" known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _laser_varlen)
    # the layout says who sees whom, so no [T, T] mask is made
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, **__: None)


@contextmanager
def running(layout: PackedLayout | None) -> Iterator[None]:
    """While this is open, the layers of this thread run this batch."""
    before = running_layout()
    _running.layout = layout
    try:
        yield
    finally:
        _running.layout = before


def running_layout() -> PackedLayout | None:
    """The batch that this thread runs; None outside of `FrozenLM`."""
    return getattr(_running, "layout", None)


def _laser_varlen(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The signature transformers calls: query [1, H, T, d], key and value [1, H_kv, T, d] -> [1, T, H, d]."""
    for name, meaning in _REFUSED_OPTIONS.items():
        if options.get(name) is not None:
            raise ValueError(f"FrozenLM: {type(module).__name__} must not use {meaning}, got {name}={options[name]!r}")
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    heads = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    kind: dict[str, Any] = {"causal": causal, "sliding_window": sliding_window}
    kind |= {"scale": scaling, "dropout": dropout, "softcap": softcap}
    # the layout must not become part of a graph; with a gradient the graph ends here
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _packed_attention(*heads, s_aux, **kind)[None], None
    layout = running_layout()
    if layout is None:
        raise RuntimeError('attention "laser_varlen": the model must be called through FrozenLM, got a direct call')
    return layout.attend(module, *heads, sinks=s_aux, **kind)[None], None


@torch.library.custom_op("laser_fast::packed_attention", mutates_args=())
def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    *,
    causal: bool,
    sliding_window: int | None,
    scale: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """`PackedLayout.attend` as one opaque operation, for compiled layers."""
    layout: PackedLayout = _running.layout
    options: dict[str, Any] = {"scale": scale, "dropout": dropout, "softcap": softcap, "sinks": sinks}
    attended = layout.attend(None, query, key, value, causal=causal, sliding_window=sliding_window, **options)
    return attended.contiguous()


@_packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, **options: Any) -> Tensor:
    return query.new_empty(query.shape)
