"""Random language models of a report: packed batches for them, the least a step computes, and its memory plan."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from workloads import draw_lengths

from laser_fast.config import LaserConfig, build_config
from laser_fast.lm.execution.execution import frozen_layers
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.language_model import RANDOM_SCHEME
from laser_fast.lm.loading.random_models import Placement, known_shapes, random_config, random_model
from laser_fast.ops import cu_seqlens_from_lengths
from laser_fast.planning.plan import MemoryPlan, estimate_memory
from laser_fast.planning.workload import Workload
from reporting.context import Context
from reporting.reasons import package_missing

VIRTUAL_TOKENS = 33  # 32 in front of the text and one behind it
DATASET = "amazon-scientific"  # whose lengths of prompts are drawn
_FEW_ITEMS = 64  # a catalogue that takes no memory
_OF_ALL_TOKENS = ("k_proj", "v_proj")  # what the last layer computes of positions whose states nobody reads
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5  # of attention: backward computes the scores again, then four more


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
    """Forward and backward of a frozen model alone, from input embeddings to the states that are read out."""

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


def floor_operations(model: PreTrainedModel, lengths: Tensor) -> int:
    """What forward and the gradient of the inputs cannot do without where every sequence's last state is read.

    Counted are the linear layers (two operations a weight and token, forward and again for the input's gradient; frozen
    weights need none) and causal attention over the pairs that see each other. The last layer counts past its keys and
    values for the last positions alone. Norms, activations and the rotation are left out.

    Raises:
        ValueError: a model whose layers are not known.
    """
    layers = frozen_layers(model)
    if not layers:
        raise ValueError(f"floor_operations: the model must have layers that are known, got {type(model).__name__}")
    tokens, sequences = int(lengths.sum()), len(lengths)
    weights = tokens * sum(count for layer in layers[:-1] for count in _linear_weights(layer).values())
    for name, count in _linear_weights(layers[-1]).items():
        weights += count * (tokens if name.endswith(_OF_ALL_TOKENS) else sequences)
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = int((lengths * (lengths + 1) // 2).sum())
    seen = pairs * (len(layers) - 1) + tokens  # the last position sees its whole sequence
    attention = 2 * (_FORWARD_PRODUCTS + _BACKWARD_PRODUCTS) * config.num_attention_heads * head_size * seen
    return 2 * 2 * weights + attention


def _linear_weights(layer: nn.Module) -> dict[str, int]:
    """Numbers of weights by name; those in 4 bits are linear layers as well."""
    linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    return {name: module.in_features * module.out_features for name, module in linears}


def plan_of_language_model(
    context: Context, shape: str, weights: str, lengths: Tensor, modes: Sequence[str]
) -> MemoryPlan:
    """What the plan says of a run that trains a suffix and nothing else, with sequences of this mean length."""
    lm = {
        "path": path_of(shape, context.folder),
        "quantization": weights,
        "dtype": context.settings.dtype,
        "embedding_device": "cpu" if context.on_gpu else "model",
    }
    settings = {
        "data": "none",
        "output": "none",
        "lm": lm,
        "bituning": {"prefix": "none", "head": "none", "readout": "suffix"},
        "text": {"residual": False},
        "objective": {"item_gradient": "none", "popularity": False},
        "execution": {"checkpointing": modes[0]},
        "training": {},
    }
    workload = Workload(_FEW_ITEMS, user_tokens=float(lengths.double().mean()) - 1, item_tokens=0, history=1)
    return estimate_memory(build_config(LaserConfig, settings), workload, on_gpu=context.on_gpu, modes=modes)
