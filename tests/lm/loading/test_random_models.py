"""Models with random weights: built as transformers builds them, and packed as bitsandbytes packs them."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertModel, PreTrainedModel

from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.random_models import Placement, known_shapes, random_config, random_model

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install laser-fast[4bit])"
)
CPU = torch.device("cpu")
# of all parameters, as their publishers count them, less those of a head that is not tied to the embeddings
PARAMETERS = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "llama-3-8b": 8_030_261_248 - 128_256 * 4096,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360 - 151_936 * 4096,
}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 80}
# an odd width
GROUPED = SIZES | {"intermediate_size": 97, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": False}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": SIZES | {"intermediate_size": 96, "num_key_value_heads": 2},  # biases
    "qwen3": GROUPED,
    "gemma2": GROUPED | {"initializer_range": 0.1},
    "gemma3_text": GROUPED | {"layer_types": ["sliding_attention", "full_attention"]},
    "bert": SIZES | {"intermediate_size": 96},
    "gpt2": {"vocab_size": 80, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
}


def folder_of(name: str, folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": name, **ARCHITECTURES[name]}), encoding="utf-8")
    return str(folder)


def build(name: str, folder: Path, *, packed: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    placement = Placement(dtype, CPU, CPU, packed=packed)
    return random_model(random_config(folder_of(name, folder)), placement, seed=seed)


def quantised(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The same shape as bitsandbytes itself packs it."""
    from transformers import BitsAndBytesConfig

    model.to(dtype).save_pretrained(folder)
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModel.from_pretrained(folder, dtype=dtype, quantization_config=options, device_map={"": "cpu"})


def packed_layers(model: nn.Module) -> dict[str, Any]:
    import bitsandbytes

    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def unpacked(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("shape", PARAMETERS)
def test_shapes_have_the_size_of_the_published_models(shape: str) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(random_config(shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[shape]


def test_every_shape_is_known_and_keeps_its_positions() -> None:
    assert set(known_shapes()) == {*PARAMETERS, "llama-tiny"}
    assert random_config("llama-3.2-1b").rope_parameters["factor"] == 32.0
    assert random_config("gemma-3-1b").rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert random_config("gemma-3-1b").layer_types.count("full_attention") == 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_unpacked_model_is_initialised_as_its_class_does(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path, packed=False)
    torch.manual_seed(1)
    expected = AutoModel.from_config(random_config(str(tmp_path)))
    expected.requires_grad_(False)
    ours, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    for key, value in ours.items():
        deviation = float(theirs[key].std(correction=0))
        # a sample of n normal numbers has a deviation that is off by one part in sqrt(2 n); six times that is never
        assert float(value.std(correction=0)) == pytest.approx(deviation, rel=6 / value.numel() ** 0.5), key
        assert float(value.mean()) == pytest.approx(float(theirs[key].mean()), abs=8 * deviation / value.numel() ** 0.5)
        assert not value.requires_grad
    buffers = dict(expected.named_buffers())
    assert set(buffers) == {key for key, _ in model.named_buffers()}
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    assert not model.training


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "bert"])
def test_a_packed_model_is_built_as_bitsandbytes_builds_it(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(name, tmp_path, packed=True, dtype=dtype)
    expected = quantised(build(name, tmp_path, packed=False), tmp_path / "unpacked", dtype)
    modules = {key: type(module) for key, module in expected.named_modules()}
    assert {key: type(module) for key, module in model.named_modules()} == modules
    layers, references = packed_layers(model), packed_layers(expected)
    assert layers
    for key, reference in references.items():
        assert_same_form(layers[key], reference)
    ours, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
    assert {key: (value.dtype, value.shape) for key, value in ours.items()} == {
        key: (value.dtype, value.shape) for key, value in theirs.items()
    }
    lm = FrozenLM(model)
    states = lm(lm.embed(torch.arange(9)), torch.tensor([0, 4, 9], dtype=torch.int32)).float()
    assert states.isfinite().all() and 0.1 < float(states.std()) < 10


def assert_same_form(layer: Any, reference: Any) -> None:
    """Two 4-bit layers agree in everything but their numbers."""
    ours, theirs = layer.weight.quant_state, reference.weight.quant_state
    assert layer.quant_state is ours and layer.compute_dtype == reference.compute_dtype
    assert type(layer.weight) is type(reference.weight)
    for field in ("blocksize", "quant_type", "quant_storage", "compress_statistics", "bnb_quantized"):
        assert getattr(layer.weight, field) == getattr(reference.weight, field), field
    for field in ("shape", "dtype", "blocksize", "quant_type", "nested"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for field in ("blocksize", "dtype", "nested"):
        assert getattr(ours.state2, field) == getattr(theirs.state2, field), field
    assert torch.equal(ours.code, theirs.code) and torch.equal(ours.state2.code, theirs.state2.code)
    tensors = [(ours.absmax, theirs.absmax), (ours.state2.absmax, theirs.state2.absmax), (ours.offset, theirs.offset)]
    for tensor, other in [(layer.weight, reference.weight), *tensors]:
        assert tensor.shape == other.shape and tensor.dtype == other.dtype
    assert ours.as_dict(packed=True).keys() == theirs.as_dict(packed=True).keys()


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_unpacked_weights_have_the_deviation_of_the_configuration(name: str, tmp_path: Path) -> None:
    expected = {"llama": 0.02, "gemma2": 0.1}[name]
    wide = {"model_type": name, **ARCHITECTURES[name], "hidden_size": 512, "intermediate_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(wide), encoding="utf-8")
    model = random_model(random_config(str(tmp_path)), Placement(torch.float32, CPU, CPU, packed=True))
    weights = torch.cat([unpacked(layer).flatten() for layer in packed_layers(model).values()])
    assert float(weights.std()) == pytest.approx(expected, rel=0.02)
    assert abs(float(weights.mean())) < 0.05 * expected  # NF4's values do not add up to zero
    for layer in packed_layers(model).values():
        if layer.weight.numel() > 2**15:
            assert float(unpacked(layer).std()) == pytest.approx(expected, rel=0.02)
    codes = torch.cat([layer.weight.flatten() for layer in packed_layers(model).values()])
    counts = torch.bincount(codes.long(), minlength=256).float()
    assert float((counts / counts.mean() - 1).abs().max()) < 6 * float(counts.mean()) ** -0.5  # Poisson, six sigma


@needs_bitsandbytes
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "nf4"])
def test_a_seed_gives_one_model_and_leaves_the_global_generator(packed: bool, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build("llama", tmp_path, packed=packed, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    weights = [model.get_submodule("layers.0.mlp.up_proj").weight for model in (first, other)]
    assert not torch.equal(*weights)
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
    layers = [first.get_submodule(f"layers.{index}.mlp.up_proj").weight for index in (0, 1)]
    assert not torch.equal(*layers)


@pytest.mark.gpu
@needs_bitsandbytes
def test_packed_weights_are_drawn_on_the_device_and_stay_there(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    config = random_config(folder_of("llama", tmp_path))
    model = random_model(config, Placement(torch.bfloat16, device, CPU, packed=True))
    assert model.get_input_embeddings().weight.device == CPU

    def held(layer: Any) -> list[torch.Tensor]:
        state = layer.weight.quant_state
        return [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]

    places = {key: [tensor.data_ptr() for tensor in held(layer)] for key, layer in packed_layers(model).items()}
    for layer in packed_layers(model).values():
        assert {tensor.device for tensor in held(layer)} == {device}
        assert float(unpacked(layer).float().std()) == pytest.approx(0.02, rel=0.1)
    model.to(device)
    for key, layer in packed_layers(model).items():
        assert [tensor.data_ptr() for tensor in held(layer)] == places[key], key
    lm = FrozenLM(model)
    states = lm(lm.embed(torch.arange(9, device=device)), torch.tensor([0, 4, 9], dtype=torch.int32, device=device))
    assert states.device == device and states.isfinite().all()


@needs_bitsandbytes
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bert"])  # gemma's table scales, bert's has a row of padding
def test_without_token_embeddings_one_row_stands_for_all(name: str, packed: bool, tmp_path: Path) -> None:
    config = random_config(folder_of(name, tmp_path))
    host = torch.device("meta")  # where the table would lie
    model = random_model(config, Placement(torch.float32, CPU, host, packed=packed, token_embeddings=False))
    whole = random_model(config, Placement(torch.float32, CPU, CPU, packed=packed))
    table = model.get_input_embeddings()
    assert table.weight.shape == (80, 64) and table.weight.device == CPU
    assert sum(parameter.numel() for parameter in whole.parameters()) - 79 * 64 == sum(
        parameter.numel() for parameter in model.parameters()
    )
    for moved in (model, copy.deepcopy(model), model.to(torch.float64) if not packed else model.to(CPU)):
        kept = moved.get_input_embeddings().weight
        assert kept.stride() == (0, 1) and kept.untyped_storage().nbytes() == 64 * kept.element_size()
        assert kept.dtype == next(moved.parameters()).dtype
    model = model.to(torch.float32)
    lm, other = FrozenLM(model), FrozenLM(whole)
    assert lm.device == CPU and lm.embedding_rms == pytest.approx(other.embedding_rms, rel=6 * 64**-0.5)
    embedded = lm.embed(torch.tensor([3, 79, 0]))
    assert embedded.shape == (3, 64) and torch.equal(embedded, embedded[:1].expand(3, 64))
    assert float(embedded.norm()) == pytest.approx(float(other.embed(torch.tensor([3, 79, 1])).norm()), rel=0.5)
    states = lm(torch.randn(9, 64), torch.tensor([0, 4, 9], dtype=torch.int32))
    assert states.isfinite().all() and 0.1 < float(states.std()) < 10


def test_unknown_shapes_and_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder with a config.json or one of gemma-2-2b, .*; got 'llama-9b'"):
        random_config("llama-9b")
    with pytest.raises(ValueError, match="folder with a config.json"):
        random_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoModel": "code.Mine"}}')
    with pytest.raises(ValueError, match=r"model_type of '.*' must be an architecture of transformers, got 'mine'"):
        random_config(str(tmp_path))


@needs_bitsandbytes
def test_a_model_without_linear_layers_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have linear layers, got none in GPT2Model"):
        build("gpt2", tmp_path, packed=True)


def test_a_class_that_leaves_a_weight_unwritten_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    initialise = BertModel._init_weights

    def forget_norms(self: BertModel, module: nn.Module) -> None:
        if not isinstance(module, nn.LayerNorm):
            initialise(self, module)

    monkeypatch.setattr(BertModel, "_init_weights", forget_norms)
    with pytest.raises(RuntimeError, match="BertModel must initialise embeddings.LayerNorm.weight, got a class that"):
        build("bert", tmp_path, packed=False)
