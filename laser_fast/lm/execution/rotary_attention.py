"""Attention whose queries and keys are rotated in one launch: projections, norms of heads, rotation, packed attention.

The attention modules of transformers call their rotation as a global function, which is not ours to replace. This runs
in place of a module that computes exactly these steps.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laser_fast.lm.exchanged_attention import running_layout
from laser_fast.lm.execution.recognition import TWIN_WIDTH, frozen_projections, small_twin
from laser_fast.ops.rotary import rotary_embedding

_PROBE_NAME = "laser_probe"
_PROBE_SCALES = (1.0, 30.0, 1e4)  # of the rows; the largest shows whether a module clips its projections
_PROBE_POSITIONS = (0, 7, 10_000_000)  # the last shows whether it scales by the position
_PROBE_SEEDS = (0, 1)  # show options that depend on the input
_FORMS = (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj"))  # the second: Phi-3
_NORMS = ("q_norm", "k_norm")
_OWN_ARGUMENTS = ("position_embeddings", "past_key_values", "attention_mask")  # the others go to the attention


@dataclass(frozen=True)
class AttentionForm:
    """How a module computes its attention."""

    head_size: int
    splits: tuple[int, int, int] | None  # H d, H_kv d, H_kv d where one projection gives queries, keys and values
    normed: bool  # whether heads of queries and keys are normalised before the rotation (Qwen3, Gemma 3)
    widths: frozenset[int]  # of the tables cos and sin that were tried
    options: Mapping[str, Any]  # what it tells the attention itself: scaling, sliding window, soft cap


def rotary_widths(model: nn.Module) -> set[int]:
    """Widths that the tables of this model may have: twice the length of a vector of frequencies."""
    vectors = (buffer for buffer in model.buffers() if buffer.dim() == 1 and buffer.is_floating_point())
    return {2 * buffer.shape[0] for buffer in vectors}


def recognise_rotary_attention(module: nn.Module, widths: Iterable[int]) -> AttentionForm | None:
    """How this module computes attention with rotated queries and keys; None where it computes something else.

    A small twin is tried with random tables. What it gives the attention and what it makes of the answer must be what
    `rotary_attention` gives and makes.

    Args:
        widths: of tables to try beside those as wide as a head.
    """
    norms = [name for name in _NORMS if isinstance(getattr(module, name, None), nn.Module)]
    head_size = getattr(module, "head_dim", None)
    names = frozen_projections(module, _FORMS, *(getattr(module, name) for name in norms))
    if not names or len(norms) == 1 or not isinstance(head_size, int) or not hasattr(module, "config"):
        return None
    splits = None
    if len(names) == 2:
        joint, out = (getattr(module, name) for name in names)
        keys = (joint.out_features - out.in_features) // 2
        splits = out.in_features, keys, keys
    twin = small_twin(module, names, norms)
    twin.config = _ProbedConfig(module.config)
    found: AttentionForm | None = None
    for width in sorted({head_size, *widths}):
        if width > head_size or width % 2:
            continue
        tried = _tried(twin, AttentionForm(head_size, splits, bool(norms), frozenset({width}), {}))
        if tried is not None and (found is None or tried.options == found.options):
            found = tried if found is None else replace(found, widths=found.widths | {width})
    return found


def rotary_attention(module: Any, form: AttentionForm, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the module's forward: [1, T, D] -> [1, T, D], and what else the attention returns.

    A call of a form that was not tried (eager attention, a cache, several rows) goes to the module's own forward.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation)
    tables = kwargs.get("position_embeddings", ())
    tried = not args and not module.training and kwargs.get("past_key_values") is None and hidden_states.shape[0] == 1
    if attend is None or not tried or not _fit(tables, form, hidden_states.shape[1]):
        return type(module).forward(module, hidden_states, *args, **kwargs)
    layout = running_layout()
    query, key, value = _project(module, form, hidden_states[0], with_queries=layout is None or not layout.keys_only)
    query, key = rotary_embedding(query, key, *(table[0] for table in tables))
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    options = {name: given for name, given in kwargs.items() if name not in _OWN_ARGUMENTS}
    attended, weights = attend(module, *heads_first, kwargs.get("attention_mask"), **form.options, **options)
    return module.o_proj(attended.flatten(2)), weights


def _fit(tables: Any, form: AttentionForm, num_tokens: int) -> bool:
    known = {(1, num_tokens, width) for width in form.widths}
    return isinstance(tables, tuple) and len(tables) == 2 and {getattr(table, "shape", ()) for table in tables} <= known


def _project(module: Any, form: AttentionForm, hidden_states: Tensor, *, with_queries: bool) -> tuple[Tensor, ...]:
    """[T, D] -> queries [T, H, d] (without `with_queries` [T, 0, d]), keys and values [T, H_kv, d]."""
    query: Any = None
    if form.splits is not None:
        query, key, value = module.qkv_proj(hidden_states).split(form.splits, dim=-1)
        value = value.contiguous()  # a view kept for backward would keep the raw queries and keys as well
    else:
        key, value = module.k_proj(hidden_states), module.v_proj(hidden_states)
        if with_queries:
            query = module.q_proj(hidden_states)
    key, value = (tensor.unflatten(-1, (-1, form.head_size)) for tensor in (key, value))
    key = module.k_norm(key) if form.normed else key
    if not with_queries:
        return key.detach()[:, :0], key, value
    query = query.unflatten(-1, (-1, form.head_size))
    return module.q_norm(query) if form.normed else query, key, value


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    """An attention that notes what it is given and answers with the queries."""
    calls: list[tuple[Any, ...]] = options.pop(_PROBE_NAME)
    calls.append((query, key, value, mask, options))
    return query.transpose(1, 2), None


class _ProbedConfig:
    """The configuration of a module with another attention."""

    _attn_implementation = _PROBE_NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _tried(twin: Any, form: AttentionForm) -> AttentionForm | None:
    """The form with the options that the module gives the attention, where both compute the same."""
    from transformers import AttentionInterface

    AttentionInterface.register(_PROBE_NAME, _record)
    found: AttentionForm | None = None
    for seed in _PROBE_SEEDS:
        inputs = _probe_inputs(seed, *form.widths)
        try:
            theirs = _called(partial(type(twin).forward, twin), inputs)
            own = {name: value for name, value in theirs.options.items() if name not in inputs}
            if not all(value is None or isinstance(value, bool | int | float) for value in own.values()):
                return None
            found = replace(form, options=own) if found is None else found
            ours = _called(partial(rotary_attention, twin, found), inputs)
        except Exception:  # a module of another kind asks for what it is not given
            return None
        if found.options != own or not _same_call(ours, theirs, inputs):
            return None
    return found


def _probe_inputs(seed: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor(_PROBE_SCALES, device="cpu")[:, None]
    rows = scales * torch.randn(len(scales), TWIN_WIDTH, generator=generator, device="cpu")
    # not the tables of a rotation: their halves differ, and no pair has length one
    cos, sin = torch.randn(2, 1, len(scales), width, generator=generator, device="cpu")
    return {
        "hidden_states": rows[None],
        "position_embeddings": (cos, sin),
        "attention_mask": torch.zeros(1, 1, 1, 1, device="cpu"),
        "position_ids": torch.tensor([_PROBE_POSITIONS], device="cpu"),
    }


@dataclass(frozen=True)
class _Call:
    """What a module gave the attention and what it returned."""

    tensors: list[Tensor]  # query, key, value and output
    others: list[Any]  # mask and attention weights
    options: dict[str, Any]


def _called(forward: Callable[..., Any], inputs: dict[str, Any]) -> _Call:
    calls: list[tuple[Any, ...]] = []
    with torch.no_grad():
        output, weights = forward(**inputs, **{_PROBE_NAME: calls})
    ((*tensors, mask, options),) = calls
    return _Call([*tensors, output], [mask, weights], options)


def _same_call(ours: _Call, theirs: _Call, inputs: dict[str, Any]) -> bool:
    handed = {name: given for name, given in inputs.items() if name in ours.options}  # which a module may keep
    return (
        all(_same_rows(*pair) for pair in zip(ours.tensors, theirs.tensors, strict=True))
        and all(our is their for our, their in zip(ours.others, theirs.others, strict=True))
        and ours.options.keys() == (handed | theirs.options).keys()
        and all(ours.options[name] is value or ours.options[name] == value for name, value in theirs.options.items())
    )


def _same_rows(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    return bool(((actual - expected).abs() <= 1e-5 * expected.abs().amax(dim=-1, keepdim=True)).all())
