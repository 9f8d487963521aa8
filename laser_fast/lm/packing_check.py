"""Whether a model computes a sequence in a packed batch as it computes the sequence alone, tried once per model.

Layers that look across positions without attention (convolutions, recurrences) would mix neighbours in the batch, and
models count positions from different numbers.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laser_fast.lm.exchanged_attention import ATTENTION_NAME
from laser_fast.ops.precision import autocast_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = (5, 9)
PROBE_TOKENS = sum(_LENGTHS)
_TOLERANCE = 1e-3
# In half precision eager attention rounds elsewhere, and differences grow with the layers: random Llamas in bfloat16 of
# 2, 8, 32 and 64 layers differ by 0.011, 0.023, 0.049 and 0.074. Mixed neighbours change states by about 1.
_LEAST_HALF_TOLERANCE, _HALF_TOLERANCE = 0.05, 0.03  # the second times the root of the number of layers

RunPacked = Callable[[Tensor, Tensor, int], tuple[Tensor, int]]


def first_position(model: "PreTrainedModel", run_packed: RunPacked, embeds: Tensor) -> int:
    """Run two short sequences packed and alone; the number from which this model counts positions.

    Args:
        run_packed: embeddings [T, D], cu_seqlens int32 [3] and a first position -> hidden states [T, D] and the number
            of attention calls.
        embeds: [PROBE_TOKENS, D], of the scale of token embeddings.
    """
    try:
        with torch.inference_mode(False):
            return _first_position(model, run_packed, embeds)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if str(error).startswith("FrozenLM: "):
            raise
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"FrozenLM: {type(model).__name__} must run on input embeddings alone and without a cache, "
            f"got {type(error).__name__}: {reason}"
        ) from error


def _first_position(model: "PreTrainedModel", run_packed: RunPacked, embeds: Tensor) -> int:
    cu_seqlens = torch.tensor([0, *_LENGTHS], device=embeds.device).cumsum(0).to(torch.int32)
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    tolerance = _TOLERANCE
    if embeds.dtype not in (torch.float32, torch.float64):
        tolerance = max(_LEAST_HALF_TOLERANCE, _HALF_TOLERANCE * float(num_layers or 1) ** 0.5)
    differences = {}
    # autocast rounds both ways differently, and the first call may be under it
    with torch.no_grad(), autocast_off(embeds.device):
        expected = _alone(model, embeds)
        for start in _candidates(model):
            try:
                packed, num_calls = run_packed(embeds, cu_seqlens, start)
            except IndexError:  # fewer positions than that
                continue
            # a prefix belongs to a layer, and the last layer may be cut short
            if num_layers is not None and num_calls > num_layers:
                raise RuntimeError(
                    f"FrozenLM: {type(model).__name__} must call its attention once in every layer, "
                    f"got {num_calls} calls in {num_layers} layers"
                )
            scale = expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
            difference = float((packed.double() - expected.double()).norm() / scale)
            differences[start] = math.inf if math.isnan(difference) else difference
    least = min(differences.values())
    if least <= tolerance:  # a shift of rotated positions is only rounding, so take the first that is good
        return next(start for start, difference in differences.items() if difference <= max(2 * least, _TOLERANCE))
    raise RuntimeError(
        f"FrozenLM: {type(model).__name__} must give a sequence the same states packed with others as alone, got a "
        f"difference of {least:.1%}; layers that look across positions without attention cannot run packed"
    )


def _alone(model: "PreTrainedModel", embeds: Tensor) -> Tensor:
    """Every sequence by itself through the model's own attention: [T, D]."""
    model.set_attn_implementation("eager")
    try:
        states = [model(inputs_embeds=part[None]).last_hidden_state[0] for part in embeds.split(list(_LENGTHS))]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return torch.cat(states)


def _candidates(model: "PreTrainedModel") -> list[int]:
    """0, and behind the padding index where a table of positions has one (RoBERTa and its kin)."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    behind: set[Any] = {table.padding_idx + 1 for table in tables if table.padding_idx is not None}
    # the padding index of tokens may lie beyond the last position, which would end the process on a GPU
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    return [0, *sorted(start for start in behind - {0} if start + max(_LENGTHS) <= most)]
