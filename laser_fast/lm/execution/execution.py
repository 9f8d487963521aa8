"""How a frozen Hugging Face model runs a step: what backward keeps, what it computes again, what it need not compute.

Single module instances get another `forward`. They are found by what they compute (`recognise_norm`,
`recognise_gated_mlp`, `recognise_rotary_attention`) and not by the name of the model.
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

from laser_fast.lm.exchanged_attention import running, running_layout
from laser_fast.lm.execution.frozen_linear import UnpackedWeights, is_packed, packed_linear
from laser_fast.lm.execution.frozen_mlp import gated_mlp, recognise_gated_mlp
from laser_fast.lm.execution.frozen_norm import frozen_rms_norm, recognise_norm
from laser_fast.lm.execution.host_store import HostStore
from laser_fast.lm.execution.rotary_attention import recognise_rotary_attention, rotary_attention, rotary_widths
from laser_fast.lm.uncompiled import uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINTING = ("none", "mlp", "full", "offload")  # each keeps less than the one before it and takes longer


@dataclass(frozen=True)
class Execution:
    """How a frozen language model runs; every choice gives the same numbers up to rounding.

    Attributes:
        checkpointing: what backward computes again: "none"; "mlp": the inner activations of gated MLPs; "full": every
            layer from its input; "offload": as "full", with these inputs in host memory meanwhile.
        fused: RMSNorms and gated MLPs keep only what backward needs; queries and keys are rotated in one launch.
        share_dequantization: with "full" and "offload", a 4-bit weight is unpacked once for recomputation and backward;
            the unpacked weights of one layer then exist together.
        last_layer: "readout": where only the last position of every sequence is read, the last layer computes keys and
            values alone for the others; "all": it computes everything.
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
    """How many modules of each kind `apply_execution` recognised."""

    norms: int
    mlps: int
    attentions: int


def apply_execution(model: "PreTrainedModel", execution: Execution) -> Replaced:
    """Give the modules of this model instance the forwards that `execution` asks for, and no others of ours."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Replacement):
            del module.forward
    unpacked = UnpackedWeights()
    packed = [module for module in model.modules() if is_packed(module)]
    for module in packed:
        module.forward = Replacement(packed_linear, module, unpacked)
    norms = mlps = attentions = 0
    if execution.fused:
        recognise_attention = partial(recognise_rotary_attention, widths=rotary_widths(model))
        attentions = _replace_known(model, recognise_attention, rotary_attention)
        norms = _replace_known(model, recognise_norm, frozen_rms_norm)
        recompute = execution.checkpointing == "mlp"
        mlps = _replace_known(model, recognise_gated_mlp, gated_mlp, unpacked, recompute)
    if execution.checkpointing == "mlp" and not mlps:
        raise ValueError(
            f'Execution: checkpointing "mlp" needs gated MLPs, and {type(model).__name__} has none that is known; '
            'use "full"'
        )
    layers = frozen_layers(model)
    if execution.checkpointing in ("full", "offload"):
        if not layers:
            raise ValueError(
                f"Execution: checkpointing must be none or mlp for {type(model).__name__}, whose layers transformers "
                f"does not mark as such, got {execution.checkpointing!r}"
            )
        store = HostStore() if execution.checkpointing == "offload" else None
        shared = unpacked if execution.share_dequantization and packed else None
        for layer in layers[:-1]:  # the backward of the last layer follows at once, so keeping less there saves nothing
            layer.forward = Replacement(_checkpointed, layer.forward, shared, store)
    if layers and execution.last_layer == "readout":
        layers[-1].forward = Replacement(only_last_positions, layers[-1].forward)
    return Replaced(norms, mlps, attentions)


def frozen_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model in their order, as transformers marks them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class Replacement(partial[Any]):
    """A forward of ours, which can be told from one of another library."""


def _replace_known(
    model: nn.Module, recognise: Callable[[nn.Module], Any], forward: Callable[..., Any], *arguments: Any
) -> int:
    """Give every recognised module another forward, which is told what was recognised; their number."""
    count = 0
    for module in model.modules():
        form = recognise(module)
        if form is not None:
            module.forward = Replacement(forward, module, form, *arguments)
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
    """A layer of which backward keeps the input alone, on the device or on the host."""
    if not torch.is_grad_enabled():
        return forward(hidden_states, *args, **kwargs)
    layout = running_layout()

    def run(hidden_states: Tensor) -> Any:
        with running(layout):  # also in backward
            return forward(hidden_states, *args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), nullcontext() if shared is None else shared.kept()

    with nullcontext() if store is None else saved_tensors_hooks(store.put, store.get):
        # a frozen model draws no random numbers
        return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@uncompiled
def only_last_positions(forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The last layer, for `layout.rows` alone where only their states are wanted.

    A first call ends when the attention has the keys and values of all positions. A second call has the chosen rows
    alone, for which the attention reads those keys and values.
    """
    layout = running_layout()
    if layout is None or layout.rows is None:
        return forward(hidden_states, *args, **kwargs)
    rows, num_tokens = layout.rows, hidden_states.shape[1]
    with layout.rows_only(lambda: forward(hidden_states, *args, **kwargs)):
        of_rows = [_rows_of(value, rows, num_tokens) for value in (hidden_states, *args)]
        named = {name: _rows_of(value, rows, num_tokens) for name, value in kwargs.items()}
        output = forward(*of_rows, **named)
    states = output[0] if isinstance(output, tuple) else output
    # models may norm, reshape or check the states of all positions; those of the others are zeros
    full = torch.zeros_like(hidden_states).index_copy(1, rows, states)
    return (full, *output[1:]) if isinstance(output, tuple) else full


def _rows_of(value: Any, rows: Tensor, num_tokens: int) -> Any:
    """The chosen rows of tensors [1, T, ...], also in tuples; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_rows_of(part, rows, num_tokens) for part in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == num_tokens:
        return value.index_select(1, rows)
    return value
