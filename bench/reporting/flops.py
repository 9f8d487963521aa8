"""The floating-point operations that a step cannot do without, from the shapes of the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from laser_fast.lm.execution.execution import frozen_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_ALL_TOKENS = ("k_proj", "v_proj")  # what the last layer computes of positions whose states nobody reads
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5  # of attention: backward computes the scores again, then four more


def floor_operations(model: PreTrainedModel, lengths: Tensor) -> int:
    """Forward and the gradient of the inputs of a causal model of which every sequence's last state is read.

    Counted are the linear layers (two operations a weight and token, forward and again for the input's gradient; frozen
    weights need none) and attention over the pairs that see each other. The last layer counts past its keys and values
    for the last positions alone. Norms, activations and the rotation are left out.

    Args:
        lengths: int64 [B] of the sequences.

    Raises:
        ValueError: a model whose layers are not known.
    """
    layers = frozen_layers(model)
    if not layers:
        raise ValueError(f"floor_operations: the model must have layers that are known, got {type(model).__name__}")
    tokens, sequences = int(lengths.sum()), len(lengths)
    weights = 0
    for layer in layers[:-1]:
        weights += tokens * sum(count for _, count in _linear_weights(layer))
    for name, count in _linear_weights(layers[-1]):
        weights += count * (tokens if name.endswith(_OF_ALL_TOKENS) else sequences)
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = int((lengths * (lengths + 1) // 2).sum())
    seen = pairs * (len(layers) - 1) + tokens  # the last position sees its whole sequence
    attention = 2 * (_FORWARD_PRODUCTS + _BACKWARD_PRODUCTS) * config.num_attention_heads * head_size * seen
    return 2 * 2 * weights + attention


def _linear_weights(layer: nn.Module) -> list[tuple[str, int]]:
    """Names and numbers of weights; those in 4 bits are linear layers as well."""
    return [
        (name, module.in_features * module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
