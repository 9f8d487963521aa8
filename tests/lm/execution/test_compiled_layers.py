"""Compiled layers: the same results, one compilation for all batches and all layers, nothing of it in training."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, BertConfig, Gemma2Config, LlamaConfig, Qwen3Config

from laser_fast.lm.execution.compiled_layers import compile_layers, plain_layers
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.key_value_prefix import KeyValuePrefix

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 61}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "bert": BertConfig(**SIZES),
    "gemma2": Gemma2Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        attn_logit_softcapping=2.0,
        sliding_window=5,
        query_pre_attn_scalar=3,
    ),
}


@pytest.fixture(autouse=True)
def _no_compilations_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str) -> FrozenLM:
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(CONFIGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)  # so that attention matters
    lm = FrozenLM(model)
    assert len(lm.layers) == 4
    return lm


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        lengths = torch.randint(1, 40, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
        embeds = torch.randn(int(lengths.sum()), 32, generator=generator)
        yield embeds, torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)


def prefix_of(lm: FrozenLM, size: int) -> KeyValuePrefix:
    generator = torch.Generator().manual_seed(9)
    shapes = [(size, 3, layer.num_heads, layer.head_size) for layer in lm.layers]
    keys, values = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    return KeyValuePrefix(tuple(keys), tuple(values))


@pytest.mark.parametrize("name", CONFIGS)
def test_one_compilation_serves_all_batches_and_layers(name: str) -> None:
    plain, lm = build(name), build(name)
    counter = CompileCounterWithBackend("eager")
    assert compile_layers(lm.model, counter) == 4
    for number, (embeds, cu_seqlens) in enumerate(batches(50)):
        prefix = prefix_of(lm, cu_seqlens.shape[0] - 1) if number % 3 == 2 else None
        last_only = number % 2 == 0
        with torch.inference_mode():
            actual = lm(embeds, cu_seqlens, prefix, last_only=last_only)
            expected = plain(embeds, cu_seqlens, prefix, last_only=last_only)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        if number == 0:
            # layers with and without a window differ
            assert counter.frame_count == (2 if name == "gemma2" else 1)
            after_the_first = counter.frame_count
    assert counter.frame_count == after_the_first


@pytest.mark.slow
def test_the_compiler_of_torch_gives_the_same() -> None:
    plain, lm = build("llama"), build("llama")
    compile_layers(lm.model)
    for embeds, cu_seqlens in batches(3):
        with torch.inference_mode():
            actual, expected = (model(embeds, cu_seqlens, last_only=True) for model in (lm, plain))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_calls_with_gradient_and_calls_that_keep_keys_run_as_ever() -> None:
    plain, lm = build("llama"), build("llama")
    counter = CompileCounterWithBackend("eager")
    compile_layers(lm.model, counter)
    embeds, cu_seqlens = next(batches(1))
    gradients = []
    for model in (plain, lm):
        leaf = embeds.clone().requires_grad_()
        model(leaf, cu_seqlens).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    with torch.no_grad():
        kept, expected = (model.key_values(embeds[None, :5]) for model in (lm, plain))
    assert all(torch.equal(*pair) for pair in zip(kept.keys, expected.keys, strict=True))
    assert counter.frame_count == 0


def test_a_changed_weight_is_seen() -> None:
    plain, lm = build("llama"), build("llama")
    counter = CompileCounterWithBackend("eager")
    compile_layers(lm.model, counter)
    embeds, cu_seqlens = next(batches(1))
    with torch.no_grad():
        before = lm(embeds, cu_seqlens)
        for model in (plain, lm):
            first, second = model.model.layers[1].mlp, model.model.layers[2].mlp
            first.down_proj.weight.mul_(-2.0)
            second.down_proj.weight = torch.nn.Parameter(second.down_proj.weight * -2.0, requires_grad=False)
        after, expected = lm(embeds, cu_seqlens), plain(embeds, cu_seqlens)
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_undone_the_layers_are_what_they_were() -> None:
    lm = build("llama")
    before = [vars(layer).get("forward") for layer in lm.model.layers]
    assert before[-1] is not None and before[0] is None
    counter = CompileCounterWithBackend("eager")
    compile_layers(lm.model, counter)
    compile_layers(lm.model, counter)
    plain_layers(lm.model)
    assert [vars(layer).get("forward") for layer in lm.model.layers] == before
    with torch.no_grad():
        lm(*next(batches(1)))
    assert counter.frame_count == 0


def test_a_layer_with_a_forward_of_another_library_is_left_alone() -> None:
    lm = build("llama")
    first = lm.model.layers[0]
    own = first.forward
    first.forward = lambda *args, **kwargs: own(*args, **kwargs)
    assert compile_layers(lm.model, "eager") == 3


def test_layers_in_four_bits_compile_once_and_are_not_packed_again() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    lm = build("llama")
    for module in list(lm.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                sizes = child.in_features, child.out_features
                packed = bitsandbytes.nn.Linear4bit(*sizes, False, torch.float32, quant_type="nf4")
                packed.load_state_dict(child.state_dict())
                setattr(module, name, packed.requires_grad_(False).to("cpu"))
    lm = FrozenLM(lm.model)
    assert len(lm.layers) == 4
    packed = [module.weight for module in lm.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    before = [weight.data.clone() for weight in packed]
    counter = CompileCounterWithBackend("eager")
    for embeds, cu_seqlens in batches(4):
        plain_layers(lm.model)
        with torch.inference_mode():
            expected = lm(embeds, cu_seqlens)
            compile_layers(lm.model, counter)
            torch.testing.assert_close(lm(embeds, cu_seqlens), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert len(packed) == 28 and all(torch.equal(*pair) for pair in zip(packed, before, strict=True))


def test_a_single_token_runs_uncompiled() -> None:
    plain, lm = build("llama"), build("llama")
    counter = CompileCounterWithBackend("eager")
    compile_layers(lm.model, counter)
    embeds, cu_seqlens = torch.ones(1, 32), torch.tensor([0, 1], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(lm(embeds, cu_seqlens), plain(embeds, cu_seqlens))
    assert counter.frame_count == 0


def test_the_last_layer_still_runs_for_the_last_positions_alone() -> None:
    lm = build("llama")
    counter = CompileCounterWithBackend("eager")
    compile_layers(lm.model, counter)
    calls: list[object] = []
    lm.model.layers[-1].forward._compiled = lambda hidden_states, *args, **kwargs: calls.append(1) or hidden_states
    with torch.no_grad():
        lm(*next(batches(1)), last_only=True)
        assert not calls
        lm(*next(batches(1)))
    assert calls
