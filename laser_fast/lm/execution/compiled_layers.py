"""Layers of a frozen model compiled by torch.compile: once for any number of tokens and of sequences.

Packed attention reads the lengths of the batch on the host. In a compiled layer it is one opaque operation
(`lm.exchanged_attention`), so no length becomes a guard; the number of tokens is a symbol. All layers of one kind share
one compiled graph.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from laser_fast.lm.exchanged_attention import running_layout
from laser_fast.lm.execution.execution import Replacement, frozen_layers, only_last_positions
from laser_fast.lm.execution.frozen_linear import UnpackedWeights, is_packed, packed_linear

Backend = str | Callable[..., Any]
_LEAST_TOKENS = 2  # torch.compile treats a size of 1 as a constant


class _CompiledForward:
    """The forward of a layer, compiled for calls without gradient."""

    def __init__(self, layer: nn.Module, backend: Backend) -> None:
        self.before: Replacement | None = vars(layer).get("forward")  # None where the class's own serves
        self._plain: Callable[..., Any] = layer.forward
        own = MethodType(type(layer).forward, _twin(layer))
        self._compiled: Callable[..., Any] = torch.compile(own, dynamic=True, backend=backend)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = running_layout()
        plain = torch.is_grad_enabled() or hidden_states.is_meta or hidden_states.shape[1] < _LEAST_TOKENS
        spared = self.before is not None and self.before.func is only_last_positions
        if plain or layout is None or layout.keep or (spared and layout.rows is not None):
            return self._plain(hidden_states, *args, **kwargs)
        if torch.is_inference_mode_enabled() and not hidden_states.is_inference():
            hidden_states = hidden_states.clone()  # other layers make inference tensors, and the kind is a guard
        return self._compiled(hidden_states, *args, **kwargs)


def compile_layers(model: nn.Module, backend: Backend = "inductor") -> int:
    """Compile every layer of a frozen model, for calls without gradient; the number of layers.

    A call of the last layer for the last position of every sequence alone runs uncompiled.
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
    """In place of the forward of bitsandbytes, which may repack the weights; all modules share it."""
    return packed_linear(module, UnpackedWeights(), x)


def _twin(module: nn.Module) -> nn.Module:
    """The same parameters and buffers, whatever becomes of them, under the forwards of the classes.

    A forward of ours belongs to one module, so every layer would be compiled for itself.
    """
    twin = copy.copy(module)  # shares the dictionaries that hold parameters and buffers
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    if isinstance(vars(twin).get("forward"), Replacement):
        del twin.forward
    if is_packed(twin):
        twin.forward = MethodType(_packed_linear, twin)
    return twin
