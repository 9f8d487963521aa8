"""Random language models of a report, and batches of packed sequences for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from workloads import draw_lengths

from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.language_model import RANDOM_SCHEME
from laser_fast.lm.loading.random_models import Placement, known_shapes, random_config, random_model
from laser_fast.ops import cu_seqlens_from_lengths
from reporting.context import package_missing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reporting.context import Context

VIRTUAL_TOKENS = 33  # 32 in front of the text and one behind it
DATASET = "amazon-scientific"  # whose lengths of prompts are drawn


def _small(width: int, inner: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    return {"model_type": "llama", "vocab_size": 1000, **sizes, **heads}


SMALL = {  # named after the weights of their linear layers
    "llama-0.4m": _small(128, 352, 2),
    "llama-1m": _small(128, 352, 5),
    "llama-3m": _small(256, 704, 4),
}


def path_of(shape: str, folder: Path) -> str:
    """What `lm.path` says of a shape: one that the library knows, or a small one, written to `folder`."""
    if shape in known_shapes():
        return f"random:{shape}"
    place = folder / shape
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(SMALL[shape]), encoding="utf-8")
    return f"random:{place}"


def settings_of(context: Context, shape: str, weights: str) -> dict[str, Any]:
    """The section `lm` of a configuration for a shape with weights "nf4" or "none"; token embeddings stay off a GPU."""
    return {
        "path": path_of(shape, context.folder),
        "quantization": weights,
        "dtype": context.settings.dtype,
        "embedding_device": "cpu" if context.on_gpu else "model",
    }


def load(context: Context, shape: str, weights: str, *, reads_tokens: bool = False) -> PreTrainedModel:
    """A random model on the device of the report; without token embeddings for steps that start from embeddings."""
    dtype, device = getattr(torch, context.settings.dtype), context.device
    placement = Placement(dtype, device, device, packed=weights == "nf4", token_embeddings=reads_tokens)
    return random_model(random_config(path_of(shape, context.folder).removeprefix(RANDOM_SCHEME)), placement)


def usable_weights(context: Context) -> tuple[tuple[str, ...], list[str]]:
    """The kinds of weights that can be run here, and what is left out with the reason."""
    if "nf4" in context.settings.weights and package_missing("bitsandbytes"):
        return ("none",), ["4-bit weights: bitsandbytes is not installed"]
    return context.settings.weights, []


def weights_name(weights: str, dtype: str) -> str:
    """As a table shows it."""
    return "NF4" if weights == "nf4" else dtype


def packed_lengths(tokens: int) -> Tensor:
    """int64 [B] that add up to `tokens`: drawn lengths of prompts with their virtual tokens, the last one cut."""
    drawn = draw_lengths(DATASET, tokens // 20 + 2) + VIRTUAL_TOKENS
    ends = drawn.cumsum(0)
    count = int((ends < tokens).sum()) + 1
    lengths = drawn[:count].clone()
    lengths[-1] -= int(ends[count - 1]) - tokens
    return lengths


class PackedStep:
    """Forward and backward of a frozen model alone, from input embeddings to the states that are read out.

    Args:
        lm: the model.
        lengths: int64 [B] of the sequences.
    """

    def __init__(self, lm: FrozenLM, lengths: Tensor) -> None:
        self.lm = lm
        self.cu_seqlens = cu_seqlens_from_lengths(lengths).to(lm.device)
        generator = torch.Generator().manual_seed(1)
        embeds = torch.randn(int(lengths.sum()), lm.hidden_size, generator=generator) * lm.embedding_rms
        self.embeds = embeds.to(lm.device, lm.dtype).requires_grad_()
        gradient = torch.randn(len(lengths), lm.hidden_size, generator=generator)
        self.gradient = gradient.to(lm.device, lm.dtype)

    def states(self) -> Tensor:
        """[B, D] of the last position of every sequence."""
        # a graph stands in front of the model in training as well: what it hands over is not a leaf
        return self.lm(self.embeds * 1.0, self.cu_seqlens, last_only=True)

    def __call__(self) -> Tensor:
        """The gradient of the embeddings."""
        return torch.autograd.grad(self.states(), self.embeds, self.gradient)[0]
