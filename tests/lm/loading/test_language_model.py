"""Loading language models: what is refused, which dtypes come out, where embeddings lie, how much memory it takes."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from laser_fast.config import LanguageModelConfig, build_config
from laser_fast.lm.loading.embedding_tables import HostEmbedding
from laser_fast.lm.loading.language_model import load_language_model, load_model
from laser_fast.lm.loading.lazy_tensors import lazy_tensors

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install laser-fast[4bit])"
)
LOAD_MEMORY = Path(__file__).resolve().parents[3] / "bench" / "load_memory.py"
MEBI = 2**20


def settings(path: str | Path, **values: Any) -> LanguageModelConfig:
    return build_config(LanguageModelConfig, {"path": str(path), **values})


def source_of(source: str, folder: Path, **values: Any) -> str:
    """A random shape, or a folder with a model of it that was written under these settings."""
    if source == "folder":
        load_model(settings("random:llama-tiny", **values)).save_pretrained(folder)
    return str(folder) if source == "folder" else "random:llama-tiny"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with a head, bfloat16, 123 MiB in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=4000, num_hidden_layers=20, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    some = torch.randn(10_007, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():  # the same few numbers again and again: drawing all takes seconds
            parameter.copy_(some.repeat(-(-parameter.numel() // len(some)))[: parameter.numel()].view_as(parameter))
    model.save_pretrained(folder, max_shard_size="30MB")
    return folder


def memory_of(path: str | Path, *, dtype: str, out: Path) -> dict[str, Any]:
    """What the script of the benchmarks measures in a process of its own."""
    command = [sys.executable, str(LOAD_MEMORY), str(path), "--dtype", dtype, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return json.loads(out.read_text(encoding="utf-8"))


@needs_bitsandbytes
@pytest.mark.slow
def test_packing_a_folder_never_holds_the_unpacked_model(sharded: Path, tmp_path: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 3
    measured = memory_of(sharded, dtype="float32", out=tmp_path / "out.json")
    if torch.cuda.is_available():
        pytest.skip("the bound below is that of a model on the CPU")
    largest = 4 * 512 * 1536  # bytes of the largest linear layer in float32
    # it is read in 16 bits, widened, and quantised by bitsandbytes' CPU code through float32 copies of it
    allowed = measured["layer_bytes"] + 2 * measured["embedding_bytes"] + 6 * largest + 8 * MEBI
    unpacked = 2 * measured["linear_weights"] + measured["embedding_bytes"]
    assert measured["layer_bytes"] < measured["peak_bytes"] < allowed < 0.65 * unpacked
    assert measured["resident_bytes"] < measured["layer_bytes"] + measured["embedding_bytes"] + 8 * MEBI


@needs_bitsandbytes
@pytest.mark.slow
def test_a_random_model_takes_its_packed_bytes(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the bound below is that of a model on the CPU")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    LlamaConfig(vocab_size=1000, num_hidden_layers=6, **sizes).save_pretrained(tmp_path)
    measured = memory_of(f"random:{tmp_path}", dtype="bfloat16", out=tmp_path / "out.json")
    assert measured["linear_weights"] == 6 * (4 * 1024**2 + 3 * 1024 * 4096)
    assert measured["peak_bytes"] <= 1.15 * measured["layer_bytes"] + measured["embedding_bytes"] + 64 * MEBI


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("source", ["folder", "random"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_everything_has_the_dtype_that_was_asked_for(
    quantization: str, source: str, dtype: str, tmp_path: Path
) -> None:
    path = source_of(source, tmp_path, dtype={"bfloat16": "float32", "float32": "bfloat16"}[dtype])
    model = load_model(settings(path, dtype=dtype, quantization=quantization))
    floating = {key: value.dtype for key, value in model.named_parameters() if value.is_floating_point()}
    assert set(floating.values()) == {getattr(torch, dtype)}
    packed = {key for key, value in model.named_parameters() if value.dtype == torch.uint8}
    assert len(packed) == (14 if quantization == "nf4" else 0)
    assert not any(value.requires_grad for key, value in model.named_parameters() if key in packed)
    for key in packed:
        weight: Any = model.get_parameter(key)
        assert weight.quant_state.dtype == getattr(torch, dtype)
    assert not model.training and "lm_head" not in dict(model.named_modules())


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_packed_weights_are_those_that_bitsandbytes_makes_of_the_stored_ones(dtype: str, tmp_path: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    plain = load_model(settings("random:llama-tiny", dtype="bfloat16"))
    plain.save_pretrained(tmp_path, max_shard_size="50kB")
    model = load_model(settings(tmp_path, dtype=dtype, quantization="nf4"))
    assert torch.equal(model.embed_tokens.weight, plain.embed_tokens.weight.to(getattr(torch, dtype)))
    for key, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            ours: Any = model.get_submodule(key).weight
            weight = module.weight.to(ours.device, getattr(torch, dtype))
            codes, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            assert torch.equal(ours.data, codes) and torch.equal(ours.quant_state.absmax, state.absmax), key
    assert model.name_or_path == str(tmp_path)


@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=needs_bitsandbytes)])
@pytest.mark.parametrize("source", ["folder", "random"])
def test_the_table_of_embeddings_may_stay_on_the_host(source: str, quantization: str, tmp_path: Path) -> None:
    path = source_of(source, tmp_path)
    hosted, plain = (
        load_model(settings(path, quantization=quantization, embedding_device=where)) for where in ("cpu", "model")
    )
    table = hosted.get_input_embeddings()
    assert isinstance(table, HostEmbedding) and table.weight.device.type == "cpu"
    assert not isinstance(plain.get_input_embeddings(), HostEmbedding)
    if not torch.cuda.is_available():
        assert torch.equal(table.weight, plain.get_input_embeddings().weight)
    if quantization == "none":  # bitsandbytes' layers cannot go to that device
        assert hosted.to("meta").get_input_embeddings().weight.device.type == "cpu"


@pytest.mark.gpu
@needs_bitsandbytes
@pytest.mark.parametrize("source", ["random", "folder"])
def test_on_a_gpu_it_loads_straight_there(source: str, tmp_path: Path) -> None:
    path = source_of(source, tmp_path, dtype="bfloat16")
    model = load_model(settings(path, quantization="nf4", embedding_device="cpu"))
    table = model.get_input_embeddings().weight
    assert table.device.type == "cpu"
    assert {value.device.type for value in model.parameters() if value is not table} == {"cuda"}
    assert {value.device.type for value in model.buffers()} == {"cuda"}


def test_a_random_model_needs_a_tokenizer_that_fits(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm.tokenizer must name a folder .* 'random:llama-tiny', got None"):
        load_language_model(settings("random:llama-tiny"))
    model, tokenizer = load_language_model(settings("random:llama-tiny", tokenizer=str(tiny_lm)))
    assert isinstance(model, PreTrainedModel) and len(tokenizer) == 16
    tokenizer.add_tokens([f"word{index}" for index in range(500)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="at most the 512 tokens of 'random:llama-tiny', got 516"):
        load_language_model(settings("random:llama-tiny", tokenizer=str(tmp_path)))


def test_the_tokenizer_of_another_folder_is_taken(tiny_lm: Path, tmp_path: Path) -> None:
    load_model(settings("random:llama-tiny")).save_pretrained(tmp_path)
    _, tokenizer = load_language_model(settings(tmp_path, tokenizer=str(tiny_lm)))
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_lm).get_vocab()


def test_lazy_tensors_read_what_is_in_the_files(sharded: Path) -> None:
    found = lazy_tensors(sharded, None, skip=("lm_head.",))
    assert found is not None and not any(name.startswith("lm_head.") for name in found)
    stored: dict[str, torch.Tensor] = {}
    for file in sharded.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
    assert set(found) == {name for name in stored if not name.startswith("lm_head.")}
    for name, lazy in found.items():
        assert lazy.get_dtype() == "BF16" and lazy.get_shape() == list(stored[name].shape)
    wide = lazy_tensors(sharded, torch.float32, skip=())
    assert wide is not None and set(wide) == set(stored)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(found[name][...], stored[name]) and torch.equal(found[name][3:5, :7], stored[name][3:5, :7])
    assert wide[name][...].dtype == torch.float32 and torch.equal(wide[name][...], stored[name].float())


def test_a_folder_without_safetensors_or_with_a_hole(tmp_path: Path) -> None:
    assert lazy_tensors(tmp_path, None, skip=("lm_head.",)) is None
    index = {"weight_map": {"norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"files of its index, got no \['model-00001-of-00002.safetensors'\]"):
        lazy_tensors(tmp_path, None, skip=("lm_head.",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, r"load_language_model: model\.safetensors must be a whole safetensors file, got "),
        ("model.safetensors", b"\x80\x04", r"load_language_model: model\.safetensors must be a whole safetensors file"),
        ("model.safetensors.index.json", b"{", r"model\.safetensors\.index\.json must name the file of every tensor"),
        ("model.safetensors.index.json", b"[]", r"model\.safetensors\.index\.json must name the file of every tensor"),
        ("model.safetensors.index.json", b"{}", r"model\.safetensors\.index\.json must name .*, got KeyError"),
    ],
    ids=["half", "other", "half index", "no object", "empty index"],
)
@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_a_damaged_folder_is_named_in_one_line(
    tiny_lm: Path, tmp_path: Path, name: str, content: bytes | None, message: str, quantization: str
) -> None:
    folder = Path(shutil.copytree(tiny_lm, tmp_path / "lm"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=message) as refused:
        load_model(settings(folder, quantization=quantization))
    assert len(str(refused.value).splitlines()) == 1
