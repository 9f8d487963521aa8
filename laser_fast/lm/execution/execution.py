"""How a frozen Hugging Face model runs a step: what backward keeps, what it computes again, what it need not compute.

Nothing of transformers is changed: single module instances get another `forward`, found by what they compute
(`recognise_norm`, `recognise_gated_mlp`, `recognise_rotary_attention`) and not by the name of the model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from laser_fast.lm.execution.frozen_linear import UnpackedWeights, is_packed, packed_linear
from laser_fast.lm.execution.frozen_mlp import activation_of, gated_mlp, recognise_gated_mlp
from laser_fast.lm.execution.frozen_norm import frozen_rms_norm, recognise_norm
from laser_fast.lm.execution.host_store import HostStore
from laser_fast.lm.execution.rotary_attention import recognise_rotary_attention, rotary_attention, rotary_widths
from laser_fast.lm.uncompiled import uncompiled
from laser_fast.ops.rms_norm import NormKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from laser_fast.lm.packed_layout import PackedLayout

CHECKPOINTING = ("none", "mlp", "full", "offload")  # each keeps less than the one before it and takes longer


@dataclass(frozen=True)
class Execution:
    """How a frozen language model runs; every choice gives the same numbers up to rounding.

    Attributes:
        checkpointing: what backward computes again: "none"; "mlp": the inner activations of gated MLPs; "full": every
            layer from its input; "offload": as "full", with those inputs in host memory meanwhile.
        fused: RMSNorm and gated MLPs that keep only what backward needs; queries and keys rotated in one launch.
        share_dequantization: with "full" and "offload", unpack a 4-bit weight once for recomputation and backward; the
            unpacked weights of one layer then exist together.
        last_layer: "readout": where only the last position of every sequence is read, the last layer computes all
            keys and values and nothing else for the other positions; "all": everything.
    """

    checkpointing: str = "none"
    fused: bool = True
    share_dequantization: bool = True
    last_layer: str = "readout"

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(f"Execution: checkpointing must be one of {CHECKPOINTING}, got {self.checkpointing!r}")
        if self.last_layer not in ("readout", "all"):
            raise ValueError(f'Execution: last_layer must be "readout" or "all", got {self.last_layer!r}')
        if self.checkpointing == "mlp" and not self.fused:
            raise ValueError('Execution: fused must be true with checkpointing "mlp", got false')


@dataclass(frozen=True)
class Replaced:
    """What `apply_execution` found: how many modules of each kind it gave another forward.

    Attributes:
        norms, mlps, attentions, packed_linears: their numbers.
        last_layer: whether the last layer can run for the last position of every sequence alone.
    """

    norms: int
    mlps: int
    attentions: int
    packed_linears: int
    last_layer: bool


def apply_execution(model: "PreTrainedModel", execution: Execution) -> Replaced:
    """Give the modules of this model instance the forwards that `execution` asks for.

    Raises:
        ValueError: "mlp" for a model without gated MLPs, or "full" and "offload" for one without layers that can be
            computed again.
    """
    for module in model.modules():  # of an earlier call
        if isinstance(vars(module).get("forward"), Replacement):
            del module.forward
    unpacked = UnpackedWeights()
    packed = [module for module in model.modules() if is_packed(module)]
    for module in packed:
        _replace(module, packed_linear, module, unpacked)
    attentions = _fuse_attentions(model) if execution.fused else 0
    norms = _fuse_norms(model) if execution.fused else 0
    mlps = _fuse_mlps(model, unpacked, execution.checkpointing == "mlp") if execution.fused else 0
    if execution.checkpointing == "mlp" and not mlps:
        raise ValueError(
            f'Execution: checkpointing "mlp" needs gated MLPs, and {type(model).__name__} has none that is known; '
            'use "full"'
        )
    layers = frozen_layers(model)
    again = layers[:-1] if execution.checkpointing in ("full", "offload") else []
    if execution.checkpointing in ("full", "offload") and not layers:
        raise ValueError(
            f"Execution: checkpointing must be none or mlp for {type(model).__name__}, whose layers transformers does "
            f"not mark as such, got {execution.checkpointing!r}"
        )
    store = HostStore() if execution.checkpointing == "offload" else None
    shared = unpacked if execution.share_dequantization and packed else None
    for layer in again:  # not the last: its backward follows at once, so what it keeps is there in any case
        _replace(layer, _checkpointed, layer.forward, shared, store)
    if layers and execution.last_layer == "readout":
        _replace(layers[-1], only_last_positions, layers[-1].forward)
    spared = bool(layers) and execution.last_layer == "readout"
    return Replaced(norms, mlps, attentions, len(packed), spared)


def frozen_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that transformers marks as such, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class Replacement(partial[Any]):
    """A forward of ours, so that it can be told from one that another library put there."""


def _replace(module: nn.Module, function: Callable[..., Any], *arguments: Any) -> None:
    module.forward = Replacement(function, *arguments)


def _fuse_norms(model: nn.Module) -> int:
    kinds: dict[tuple[type, Any], NormKind | None] = {}
    count = 0
    for module in model.modules():
        key = (type(module), getattr(module, "variance_epsilon", getattr(module, "eps", None)))
        if key not in kinds:  # one of each class is tried
            kinds[key] = recognise_norm(module)
        kind = kinds[key]
        if kind is not None:
            _replace(module, frozen_rms_norm, module, kind)
            count += 1
    return count


def _fuse_mlps(model: nn.Module, unpacked: UnpackedWeights, recompute: bool) -> int:
    activations: dict[tuple[type, Any], str | None] = {}
    count = 0
    for module in model.modules():
        act = activation_of(module)
        key = (type(module), type(act) if isinstance(act, nn.Module) else act)
        if act is None:
            continue
        if key not in activations:
            activations[key] = recognise_gated_mlp(module)
        activation = activations[key]
        if activation is not None:
            _replace(module, gated_mlp, module, activation, unpacked, recompute)
            count += 1
    return count


def _fuse_attentions(model: nn.Module) -> int:
    widths, count = rotary_widths(model), 0
    for module in model.modules():  # each is tried: their windows and scales may differ
        form = recognise_rotary_attention(module, widths)
        if form is not None:
            _replace(module, rotary_attention, module, form)
            count += 1
    return count


@uncompiled
def _checkpointed(
    forward: Callable[..., Any],
    shared: UnpackedWeights | None,
    store: HostStore | None,
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A layer of which backward keeps the input only, on the device or on the host."""
    if not torch.is_grad_enabled():
        return forward(hidden_states, *args, **kwargs)

    def layer(hidden_states: Tensor) -> Any:
        return forward(hidden_states, *args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), nullcontext() if shared is None else shared.kept()

    with nullcontext() if store is None else saved_tensors_hooks(store.put, store.get):
        return checkpoint(
            layer,
            hidden_states,
            use_reentrant=False,
            preserve_rng_state=False,  # a frozen model draws nothing
            context_fn=contexts,
        )


class _KeysKnown(Exception):
    """Raised by the attention of the last layer once its keys and values are there."""


@uncompiled
def only_last_positions(forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The last layer, past its keys and values, for the last position of every sequence alone where that is asked for.

    The keys and values of all positions come from a first call, which ends when the attention has them; the second
    call sees the chosen rows only, and the attention puts the full keys and values in the place of theirs.
    """
    layout: PackedLayout | None = kwargs.get("laser_layout")
    if layout is None or layout.rows is None:
        return forward(hidden_states, *args, **kwargs)
    num_tokens = hidden_states.shape[1]
    with layout.collecting_keys(_KeysKnown):
        try:
            forward(hidden_states, *args, **kwargs)
        except _KeysKnown:
            pass
        else:
            raise RuntimeError("Execution: the last layer must call the packed attention, got no call")
    rows = layout.rows
    args = tuple(_rows_of(value, rows, num_tokens) for value in args)
    kwargs = {name: _rows_of(value, rows, num_tokens) for name, value in kwargs.items()}
    with layout.rows_only():
        output = forward(hidden_states.index_select(1, rows), *args, **kwargs)
    states = output[0] if isinstance(output, tuple) else output
    # back among zeros: models may norm, reshape or check what comes out of the layers
    full = torch.zeros_like(hidden_states).index_copy(1, rows, states)
    return (full, *output[1:]) if isinstance(output, tuple) else full


def _rows_of(value: Any, rows: Tensor, num_tokens: int) -> Any:
    """The chosen rows of what has one row per token: tensors [1, T, ...] and tuples of such."""
    if isinstance(value, tuple):
        return tuple(_rows_of(part, rows, num_tokens) for part in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == num_tokens:
        return value.index_select(1, rows)
    return value
