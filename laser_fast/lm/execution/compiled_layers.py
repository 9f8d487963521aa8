"""Layers of a frozen model compiled by torch.compile: once for any number of tokens and of sequences.

Packed attention reads the lengths of the batch on the host. Inside a compiled layer it is therefore one opaque
operation (`lm.exchanged_attention`), so that no length ever becomes a guard; the number of tokens is a symbol. All
layers of one kind share one compiled graph.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laser_fast.lm.execution.execution import Replacement, frozen_layers, only_last_positions
from laser_fast.lm.execution.frozen_linear import UnpackedWeights, is_packed, packed_linear

if TYPE_CHECKING:
    from laser_fast.lm.packed_layout import PackedLayout

Backend = str | Callable[..., Any]
_LEAST_TOKENS = 2  # torch.compile treats a size of 1 as a constant


class _CompiledForward:
    """The forward of a layer: compiled where there is no gradient, else as it was."""

    def __init__(self, layer: nn.Module, backend: Backend) -> None:
        self.before: Replacement | None = vars(layer).get("forward")  # None where the class's own serves
        self._plain: Callable[..., Any] = layer.forward
        own = MethodType(type(layer).forward, _twin(layer))
        self._compiled: Callable[..., Any] = torch.compile(own, dynamic=True, backend=backend)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout: PackedLayout | None = kwargs.get("laser_layout")
        plain = torch.is_grad_enabled() or hidden_states.is_meta or hidden_states.shape[1] < _LEAST_TOKENS
        spared = self.before is not None and self.before.func is only_last_positions
        if plain or layout is None or layout.keep or (spared and layout.rows is not None):
            return self._plain(hidden_states, *args, **kwargs)
        if torch.is_inference_mode_enabled() and not hidden_states.is_inference():
            hidden_states = hidden_states.clone()  # what other layers made is of the other kind, and kinds are guards
        return self._compiled(hidden_states, *args, **kwargs)


def compile_layers(model: nn.Module, backend: Backend = "inductor") -> int:
    """Compile every layer of a frozen model, for calls without gradient; the number of them.

    A call of the last layer for the last position of every sequence alone runs as it did.
    """
    plain_layers(model)
    layers = [layer for layer in frozen_layers(model) if isinstance(vars(layer).get("forward"), Replacement | None)]
    for layer in layers:
        layer.forward = _CompiledForward(layer, backend)
    return len(layers)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_layers` is in force."""
    return any(isinstance(vars(module).get("forward"), _CompiledForward) for module in model.modules())


def plain_layers(model: nn.Module) -> None:
    """Undo `compile_layers`."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, _CompiledForward):
            del module.forward
            if forward.before is not None:
                module.forward = forward.before


def _packed_linear(module: nn.Module, x: Tensor) -> Tensor:
    """In place of the forward of bitsandbytes, which may repack the weights; a function that all modules share."""
    return packed_linear(module, UnpackedWeights(), x)


def _twin(module: nn.Module) -> nn.Module:
    """The same parameters and buffers, whatever becomes of them, under the forwards of the classes.

    A forward of ours belongs to one module, so every layer would be compiled for itself; without gradient it saves
    nothing that the compiler does not save as well.
    """
    twin = copy.copy(module)  # shares the dictionaries that hold parameters and buffers
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    if isinstance(vars(twin).get("forward"), Replacement):
        del twin.forward
    if is_packed(twin):
        twin.forward = MethodType(_packed_linear, twin)
    return twin
