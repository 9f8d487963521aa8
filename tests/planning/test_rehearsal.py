"""Steps without values hold the bytes of steps with values."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, Gemma2Config, LlamaConfig, Phi3Config, PretrainedConfig, Qwen3Config

from laser_fast.config import LaserConfig, build_config
from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.planning.plan import with_layers
from laser_fast.planning.rehearsal import LiveBytes, language_model_without_values, rehearse_language_model

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "vocab_size": 61}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SHAPES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "qwen3": Qwen3Config(**SIZES, **HEADS),
    "phi3": Phi3Config(**{k: v for k, v in (SIZES | HEADS).items() if k != "head_dim"}, pad_token_id=0),
    "gemma2": Gemma2Config(**SIZES, **HEADS, attn_logit_softcapping=None),
}
LENGTHS = [32] * 6  # a multiple of 16: the CPU's blocks then hold no padding


def settings(checkpointing: str) -> LaserConfig:
    values: dict[str, Any] = {
        "data": "none",
        "recommender": "none",
        "output": "none",
        "lm": {"path": "none"},
        "training": {},
        "execution": {"checkpointing": checkpointing},
    }
    return build_config(LaserConfig, values)


def really_kept(shape: PretrainedConfig, checkpointing: str) -> int:
    """Bytes that stay between forward and backward, beside weights and input."""
    lm = FrozenLM(AutoModel.from_config(copy.deepcopy(shape)), Execution(checkpointing=checkpointing))
    embeds = torch.randn(sum(LENGTHS), 64).requires_grad_()
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    with LiveBytes([*lm.parameters(), *lm.buffers(), embeds, cu_seqlens]) as bytes_:
        states = lm(embeds * 1.0, cu_seqlens, last_only=True)
        kept = bytes_.live
    assert states.requires_grad
    return kept


@pytest.mark.parametrize("checkpointing", ["none", "mlp", "full"])
@pytest.mark.parametrize("name", SHAPES)
def test_bytes_kept_of_a_token_and_layer_are_within_two_percent(name: str, checkpointing: str) -> None:
    real, rehearsed = [], []
    for num_layers in (3, 5):
        shape = with_layers(SHAPES[name], num_layers)
        real.append(really_kept(shape, checkpointing))
        lm = language_model_without_values(settings(checkpointing), shape, torch.float32)
        found = rehearse_language_model(lm, sum(LENGTHS), len(LENGTHS), last_only=True)
        assert found.peak > found.kept
        rehearsed.append(found.kept)
    assert rehearsed[1] - rehearsed[0] == pytest.approx(real[1] - real[0], rel=0.02)


def test_offloaded_inputs_are_not_on_the_device() -> None:
    kept = {}
    for mode in ("full", "offload"):
        lm = language_model_without_values(settings(mode), SHAPES["llama"], torch.float32)
        kept[mode] = rehearse_language_model(lm, 1000, 10, last_only=True).kept
    # four of the five layers are computed again, and their inputs go to the host, the last of them still on its way
    assert kept["full"] - kept["offload"] == 1000 * 64 * 4 * 3


def test_bytes_are_counted_while_their_tensors_live() -> None:
    before = torch.zeros(100)
    with LiveBytes([before]) as bytes_:
        first = torch.zeros(1000)
        assert bytes_.live == 4000
        view = first[:10].view(2, 5)
        assert bytes_.live == 4000  # no bytes of its own
        second = first + 1.0
        before.add_(1.0)
        assert (bytes_.live, bytes_.peak) == (8000, 8000)
        del first
        assert bytes_.live == 8000  # the view holds the storage
        del view
        assert bytes_.live == 4000
        third = torch.zeros(500)
        assert (bytes_.live, bytes_.peak) == (6000, 8000)
    del second, third
    assert isinstance(before, Tensor)


def test_layers_in_four_bits_have_their_bytes() -> None:
    config = settings("none")
    config = config.model_copy(update={"lm": config.lm.model_copy(update={"quantization": "nf4"})})
    lm = language_model_without_values(config, SHAPES["llama"], torch.bfloat16)
    linears = 5 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    packed = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]
        if "proj" in name
    )
    assert packed / linears == pytest.approx((4 + 8 / 64 + 32 / 64 / 256) / 8, rel=0.01)
    dense = rehearse_language_model(
        language_model_without_values(settings("none"), SHAPES["llama"], torch.bfloat16), 192, 6, last_only=True
    )
    four_bits = rehearse_language_model(lm, 192, 6, last_only=True)
    assert four_bits.kept == dense.kept  # no unpacked weight stays for backward
    assert four_bits.peak >= dense.peak
