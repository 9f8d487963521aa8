"""Compiled layers: the same results, one compilation for all batches and all layers, nothing of it in training."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from laser_fast.lm.execution.compiled_layers import compile_layers, plain_layers
from laser_fast.lm.frozen_lm import FrozenLM

from ..families import random_model
from ..packed import assert_close, pack_linears, packed_inputs, random_prefix


@pytest.fixture(autouse=True)
def _no_compilations_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str = "llama", num_layers: int = 3) -> FrozenLM:
    lm = FrozenLM(random_model(name, num_hidden_layers=num_layers))
    assert len(lm.layers) == num_layers
    return lm


def compiled(lm: FrozenLM) -> CompileCounterWithBackend:
    """Compile the layers; counts the compilations."""
    counter = CompileCounterWithBackend("eager")
    assert compile_layers(lm.model, counter) == len(lm.layers)
    return counter


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for seed in range(count):
        size = int(torch.randint(1, 9, (), generator=generator))
        yield packed_inputs(torch.randint(1, 40, (size,), generator=generator).tolist(), seed=seed)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "gemma2"])
def test_one_compilation_serves_all_batches_and_layers(name: str) -> None:
    plain, lm = build(name), build(name)
    counter = compiled(lm)
    for number, (embeds, cu_seqlens) in enumerate(batches(20)):
        prefix = random_prefix(lm, cu_seqlens.shape[0] - 1)[0] if number % 3 == 2 else None
        with torch.inference_mode():
            actual, expected = (one(embeds, cu_seqlens, prefix, last_only=number % 2 == 0) for one in (lm, plain))
        assert_close(actual, expected)
        assert counter.frame_count == (2 if name == "gemma2" else 1)  # layers with and without a window differ


@pytest.mark.slow
def test_the_compiler_of_torch_gives_the_same() -> None:
    plain, lm = build(num_layers=1), build(num_layers=1)
    compile_layers(lm.model)
    for embeds, cu_seqlens in batches(2):
        with torch.inference_mode():
            assert_close(*(model(embeds, cu_seqlens) for model in (lm, plain)))


def test_calls_with_gradient_and_calls_that_keep_keys_run_as_ever() -> None:
    plain, lm = build(), build()
    counter = compiled(lm)
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
    plain, lm = build(), build()
    compiled(lm)
    embeds, cu_seqlens = next(batches(1))
    with torch.no_grad():
        before = lm(embeds, cu_seqlens)
        for model in (plain, lm):
            first, second = model.model.layers[1].mlp, model.model.layers[2].mlp
            first.down_proj.weight.mul_(-2.0)
            second.down_proj.weight = torch.nn.Parameter(second.down_proj.weight * -2.0, requires_grad=False)
        after, expected = lm(embeds, cu_seqlens), plain(embeds, cu_seqlens)
    assert not torch.allclose(before, after, atol=1e-2)
    assert_close(after, expected)


def test_undone_the_layers_are_what_they_were() -> None:
    lm = build()
    before = [vars(layer).get("forward") for layer in lm.model.layers]
    assert before[-1] is not None and before[0] is None
    compiled(lm)
    counter = compiled(lm)
    plain_layers(lm.model)
    assert [vars(layer).get("forward") for layer in lm.model.layers] == before
    with torch.no_grad():
        lm(*next(batches(1)))
    assert counter.frame_count == 0


def test_a_layer_with_a_forward_of_another_library_is_left_alone() -> None:
    lm = build()
    first = lm.model.layers[0]
    own = first.forward
    first.forward = lambda *args, **kwargs: own(*args, **kwargs)
    assert compile_layers(lm.model, "eager") == 2


def test_layers_in_four_bits_compile_once_and_are_not_packed_again() -> None:
    lm = FrozenLM(pack_linears(random_model("llama")))
    assert len(lm.layers) == 2
    packed = [parameter for parameter in lm.parameters() if parameter.dtype == torch.uint8]
    before = [weight.data.clone() for weight in packed]
    counter = CompileCounterWithBackend("eager")
    for embeds, cu_seqlens in batches(3):
        plain_layers(lm.model)
        with torch.inference_mode():
            expected = lm(embeds, cu_seqlens)
            compile_layers(lm.model, counter)
            assert_close(lm(embeds, cu_seqlens), expected)
    assert counter.frame_count == 1
    assert len(packed) == 14 and all(torch.equal(*pair) for pair in zip(packed, before, strict=True))


def test_a_single_token_runs_uncompiled() -> None:
    plain, lm = build(), build()
    counter = compiled(lm)
    inputs = packed_inputs([1])
    with torch.no_grad():
        assert torch.equal(lm(*inputs), plain(*inputs))
    assert counter.frame_count == 0


def test_the_last_layer_still_runs_for_the_last_positions_alone() -> None:
    lm = build()
    compiled(lm)
    calls: list[object] = []
    lm.model.layers[-1].forward._compiled = lambda hidden_states, *args, **kwargs: calls.append(1) or hidden_states
    with torch.no_grad():
        lm(*next(batches(1)), last_only=True)
        assert not calls
        lm(*next(batches(1)))
    assert calls
