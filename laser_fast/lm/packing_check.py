"""Whether a model computes a sequence in a packed batch as it computes the sequence alone, asked once per model.

Two things can be wrong without an error: layers that look across positions without attention (convolutions,
recurrences) mix neighbours in the batch, and positions may not count from where they are said to.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laser_fast.ops.precision import autocast_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = (5, 9)
_TOLERANCE = 1e-3
# In half precision, and with 4-bit weights computed in it, an eager attention rounds elsewhere, and layer after layer
# adds to it: random Llamas in bfloat16 of 2, 8, 32 and 64 layers differ by 0.011, 0.023, 0.049 and 0.074. Neighbours
# that are mixed change states by about 1.
_LEAST_HALF_TOLERANCE, _HALF_TOLERANCE = 0.05, 0.03  # the second times the root of the number of layers


def first_position(
    model: "PreTrainedModel", run_packed: Callable[[Tensor, Tensor, int], Tensor], attention: str, embeds: Tensor
) -> int:
    """Run two short sequences packed and alone; the number from which this model counts positions.

    Args:
        run_packed: embeddings [T, D], cu_seqlens int32 [3] and a first position -> hidden states [T, D].
        attention: name of the packed attention, which the model has again afterwards.
        embeds: [14, D], of the scale of token embeddings.

    Raises:
        RuntimeError: packed states differ from those of the sequences alone, from whatever position they count.
    """
    cu_seqlens = torch.tensor([0, *_LENGTHS], device=embeds.device).cumsum(0).to(torch.int32)
    # in the precision of the weights: autocast rounds both ways differently, and a service may be first asked under it
    with torch.no_grad(), autocast_off(embeds.device):
        expected = _alone(model, attention, embeds)
        tolerance = _tolerance(model, embeds.dtype)
        differences = {}
        for start in _candidates(model):
            try:
                packed = run_packed(embeds, cu_seqlens, start)
            except IndexError:  # fewer positions than that
                continue
            scale = expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
            difference = float((packed.double() - expected.double()).norm() / scale)
            differences[start] = math.inf if math.isnan(difference) else difference
    least = min(differences.values())
    if least <= tolerance:  # the first that is as good as the best: to rotated positions a shift is rounding
        return next(start for start, difference in differences.items() if difference <= max(2 * least, _TOLERANCE))
    raise RuntimeError(
        f"FrozenLM: {type(model).__name__} must give a sequence the same states packed with others as alone, got a "
        f"difference of {least:.1%}; layers that look across positions without attention cannot run packed"
    )


def _tolerance(model: "PreTrainedModel", dtype: torch.dtype) -> float:
    if dtype in (torch.float32, torch.float64):
        return _TOLERANCE
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    return max(_LEAST_HALF_TOLERANCE, _HALF_TOLERANCE * float(num_layers) ** 0.5)


def check_calls(model: "PreTrainedModel", num_calls: int) -> None:
    """No layer may ask its attention twice: a prefix belongs to a layer, and the last one may be cut short.

    Raises:
        RuntimeError: one does.
    """
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", num_calls)
    if num_calls > num_layers:
        raise RuntimeError(
            f"FrozenLM: {type(model).__name__} must call its attention once in every layer, "
            f"got {num_calls} calls in {num_layers} layers"
        )


@contextmanager
def name_refusals(model: str) -> Iterator[None]:
    """What a model refuses for reasons of its own while it is tried, as our refusal of the model.

    Raises:
        RuntimeError: it refused.
    """
    try:
        yield
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if str(error).startswith("FrozenLM: "):
            raise
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"FrozenLM: {model} must run on input embeddings alone and without a cache, "
            f"got {type(error).__name__}: {reason}"
        ) from error


def probe_tokens() -> int:
    """Rows of `embeds` that `first_position` takes."""
    return sum(_LENGTHS)


def _alone(model: "PreTrainedModel", attention: str, embeds: Tensor) -> Tensor:
    """Every sequence by itself through the model's own attention, with its own positions: [T, D]."""
    with _own_attention(model, attention):
        states = [model(inputs_embeds=part[None]).last_hidden_state[0] for part in embeds.split(list(_LENGTHS))]
    return torch.cat(states)


@contextmanager
def _own_attention(model: "PreTrainedModel", attention: str) -> Iterator[None]:
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def _candidates(model: "PreTrainedModel") -> list[int]:
    """0, and behind the padding index where a table of positions has one (RoBERTa and its kin).

    A padding index of tokens may lie beyond the last position, which on a GPU would end the process.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    behind: set[Any] = {table.padding_idx + 1 for table in tables if table.padding_idx is not None}
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    return [0, *sorted(start for start in behind - {0} if start + max(_LENGTHS) <= most)]
