"""Four-bit language models: what is packed, results against the dequantised weights, and what backward keeps."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from laser_fast.config import LanguageModelConfig, LaserConfig, build_config
from laser_fast.data import training_rows
from laser_fast.laser.build import build_laser, load_inputs, load_language_model
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.ops import cu_seqlens_from_lengths

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install laser-fast[4bit])"
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTHS = [5, 1, 9]


@pytest.fixture(scope="session")
def decoder(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with a head and the tokenizer of `tiny_lm`."""
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **SIZES))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)  # so that attention matters
        model.save_pretrained(folder)
    return folder


def load(folder: Path, quantization: str) -> PreTrainedModel:
    settings = {"path": str(folder), "dtype": "float32", "quantization": quantization}
    return load_language_model(build_config(LanguageModelConfig, settings))[0]


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    import bitsandbytes

    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def dequantised(folder: Path, packed: nn.Module) -> PreTrainedModel:
    """The same model in float32 with the values that the four bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, module in packed_layers(packed).items():
            weight: Any = module.weight
            model.get_submodule(name).weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    return model


def embeds() -> Tensor:
    return torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@needs_bitsandbytes
def test_every_linear_layer_is_packed_and_there_is_no_head(decoder: Path) -> None:
    model = load(decoder, "nf4")
    layers = packed_layers(model)
    linears = [name for name, module in load(decoder, "none").named_modules() if isinstance(module, nn.Linear)]
    assert set(layers) == set(linears) and len(layers) == 14
    for layer in layers.values():
        weight: Any = layer.weight
        assert weight.dtype == torch.uint8
        assert weight.numel() * 2 == layer.in_features * layer.out_features  # type: ignore[operator]
        assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
        assert not weight.requires_grad
    assert not hasattr(model, "lm_head")
    assert FrozenLM(model).dtype == torch.float32


@needs_bitsandbytes
def test_values_and_gradients_are_those_of_the_dequantised_weights(decoder: Path) -> None:
    model = load(decoder, "nf4")
    plain = FrozenLM(dequantised(decoder, model))
    packed, inputs, cu_seqlens = FrozenLM(model), embeds(), cu_seqlens_from_lengths(torch.tensor(LENGTHS))
    actual, expected = packed(inputs, cu_seqlens), plain(inputs, cu_seqlens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad((hidden * probe).sum(), inputs)[0] for hidden in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    exact = FrozenLM(load(decoder, "none"))(inputs, cu_seqlens)
    assert float(((actual - exact).norm() / exact.norm()).detach()) > 1e-3  # four bits were really used


@needs_bitsandbytes
def test_backward_keeps_no_unpacked_weight(decoder: Path) -> None:
    lm = FrozenLM(load(decoder, "nf4"))
    shapes = {(layer.out_features, layer.in_features) for layer in packed_layers(lm).values()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm(embeds(), cu_seqlens_from_lengths(torch.tensor(LENGTHS)))
    assert kept
    assert not [tensor.shape for tensor in kept if {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & shapes]


@needs_bitsandbytes
def test_laser_trains_around_packed_weights(tiny_settings: dict[str, Any], decoder: Path) -> None:
    lm = {"path": str(decoder), "dtype": "float32", "quantization": "nf4"}
    config = build_config(LaserConfig, tiny_settings | {"lm": lm})
    inputs = load_inputs(config)
    torch.manual_seed(0)
    model = build_laser(config, inputs, *load_language_model(config.lm))
    before = {name: layer.weight.clone() for name, layer in packed_layers(model).items()}  # type: ignore[operator]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.refresh_items()
    rows = training_rows(inputs.split.train, 4).select(np.arange(8))
    batch = model.builder.training_batch(rows, with_positives=True)
    losses = []
    model.eval()
    for _ in range(5):
        loss = model(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(layer.weight, before[name]) for name, layer in packed_layers(model).items())  # type: ignore[arg-type]
    assert not any(name.startswith("lm.") for name in model.state_dict())


@needs_bitsandbytes
def test_weights_that_are_packed_already_are_loaded_as_they_are(decoder: Path, tmp_path: Path) -> None:
    first = load(decoder, "nf4")
    first.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path)
    again = load(tmp_path, "none")
    assert set(packed_layers(again)) == set(packed_layers(first))
    inputs, cu_seqlens = embeds(), cu_seqlens_from_lengths(torch.tensor(LENGTHS))
    assert torch.equal(FrozenLM(again)(inputs, cu_seqlens), FrozenLM(first)(inputs, cu_seqlens))


def test_without_bitsandbytes_it_says_what_to_install(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'"nf4" needs bitsandbytes, got none; pip install "laser-fast\[4bit\]"'):
        load(decoder, "nf4")
