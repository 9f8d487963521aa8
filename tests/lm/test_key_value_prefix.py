"""Keys and values in front of packed sequences, against Hugging Face's own padded forward in float64."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.key_value_prefix import KeyValuePrefix
from laser_fast.nn.prefixes import DeepPrefix

from .families import random_model as single_precision
from .packed import random_prefix

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-head": ("llama", {"num_key_value_heads": 4}),
    "grouped-query": ("llama", {}),
    "query-norm": ("qwen3", {"head_dim": 16}),
    "sliding-window": ("mistral", {"sliding_window": 6}),
    "sliding-window-shorter-than-text": ("mistral", {"sliding_window": 3}),
    "encoder": ("bert", {}),
}
LENGTHS = [7, 1, 13, 4]
PREFIX = 5


def exact_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Hugging Face's RMSNorm goes through float32, where a difference of 1e-16 can become one of 1e-7."""
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)  # type: ignore[operator]
    return norm.weight * hidden * scale  # type: ignore[operator]


def random_model(name: str) -> PreTrainedModel:
    family, changes = CONFIGS[name]
    model = single_precision(family, **changes).double()
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(exact_norm, module)
    return model


def packed_inputs(seed: int = 3) -> tuple[Tensor, Tensor]:
    embeds = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return embeds.requires_grad_(), torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def prefix_tokens(batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch_size, PREFIX, 32, generator=generator, dtype=torch.float64).requires_grad_()


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Right-padded embeddings [B, L, D] and the bool mask of what is real."""
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return embeds, torch.arange(embeds.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def assert_same(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values, and gradients of an uneven sum of them."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    probe = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad((hidden * probe).sum(), leaves, retain_graph=True) for hidden in (actual, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert float(theirs.abs().max()) > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * float(theirs.abs().max()))


@pytest.mark.parametrize("shared", [False, True], ids=["per-sequence", "shared"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "encoder"])
def test_injected_tokens_equal_tokens_that_stand_there(name: str, shared: bool) -> None:
    model = random_model(name)
    embeds, cu_seqlens = packed_inputs()
    tokens = prefix_tokens(1 if shared else len(LENGTHS))
    rows = [torch.cat([tokens[0 if shared else b], text]) for b, text in enumerate(embeds.split(LENGTHS))]
    whole, mask = padded(rows)
    hidden = model(inputs_embeds=whole, attention_mask=mask.long()).last_hidden_state
    expected = torch.cat([hidden[b, PREFIX : PREFIX + length] for b, length in enumerate(LENGTHS)])
    lm = FrozenLM(random_model(name))
    assert_same(lm(embeds, cu_seqlens, lm.key_values(tokens)), expected, [embeds, tokens])


def test_a_prefix_behind_a_prefix() -> None:
    lm = FrozenLM(random_model("grouped-query"))
    embeds, cu_seqlens = packed_inputs()
    instruction, tokens = prefix_tokens(1)[:, :3].detach(), prefix_tokens(len(LENGTHS))
    first = lm.key_values(instruction)
    chained = first.then(lm.key_values(tokens, first))
    assert (chained.length, chained.batch_size) == (3 + PREFIX, len(LENGTHS))
    together = lm.key_values(torch.cat([instruction.expand(len(LENGTHS), -1, -1), tokens], dim=1))
    assert_same(lm(embeds, cu_seqlens, chained), lm(embeds, cu_seqlens, together), [embeds, tokens])


def deep(lm: FrozenLM, batch_size: int) -> tuple[KeyValuePrefix, list[Tensor]]:
    return random_prefix(lm, batch_size, PREFIX, dtype=torch.float64)


@pytest.mark.parametrize("shared", [False, True], ids=["per-sequence", "shared"])
@pytest.mark.parametrize("name", ["multi-head", "grouped-query", "query-norm"])
def test_a_deep_prefix_equals_a_cache_of_past_keys_and_values(name: str, shared: bool) -> None:
    lm, model = FrozenLM(random_model(name)), random_model(name)
    embeds, cu_seqlens = packed_inputs()
    prefix, leaves = deep(lm, 1 if shared else len(LENGTHS))
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        both = [tensor.expand(len(LENGTHS), -1, -1, -1).transpose(1, 2) for tensor in (key, value)]
        cache.update(*both, layer)
    whole, mask = padded(list(embeds.split(LENGTHS)))
    seen = torch.cat([torch.ones(len(LENGTHS), PREFIX, dtype=torch.bool), mask], dim=1)
    hidden = model(inputs_embeds=whole, attention_mask=seen.long(), past_key_values=cache).last_hidden_state
    assert_same(lm(embeds, cu_seqlens, prefix), hidden[mask], [embeds, *leaves])


def test_a_deep_prefix_in_an_encoder_equals_plain_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    lm = FrozenLM(random_model("encoder"))
    embeds, cu_seqlens = packed_inputs()
    prefix, leaves = deep(lm, len(LENGTHS))
    sequence, calls = 0, 0

    def plain(
        module: object, query: Tensor, key: Tensor, value: Tensor, *_: object, scaling: float, **__: object
    ) -> tuple[Tensor, None]:
        nonlocal calls
        layer = calls % 2
        calls += 1
        keys = torch.cat([prefix.keys[layer][sequence].transpose(0, 1)[None], key], dim=2)
        values = torch.cat([prefix.values[layer][sequence].transpose(0, 1)[None], value], dim=2)
        attended = (query @ keys.transpose(2, 3) * scaling).softmax(-1) @ values
        return attended.transpose(1, 2), None

    AttentionInterface.register("plain_with_prefix", plain)
    AttentionMaskInterface.register("plain_with_prefix", lambda *_, **__: None)
    model = random_model("encoder")
    model.set_attn_implementation("plain_with_prefix")
    outputs = []
    for sequence, text in enumerate(embeds.split(LENGTHS)):  # noqa: B007, `plain` reads it
        positions = torch.arange(PREFIX, PREFIX + len(text))[None]
        outputs.append(model(inputs_embeds=text[None], position_ids=positions).last_hidden_state[0])
    assert_same(lm(embeds, cu_seqlens, prefix), torch.cat(outputs), [embeds, *leaves])


def test_layers_are_found_once_and_measured() -> None:
    lm = FrozenLM(random_model("query-norm"))
    layers = lm.layers
    assert [(layer.num_heads, layer.head_size, layer.width) for layer in layers] == [(2, 16, 32)] * 2
    assert all(layer.key_rms > 0 and layer.value_rms > 0 for layer in layers)
    assert lm.layers is layers


def test_gradients_of_a_deep_prefix_reach_its_tokens_and_its_maps() -> None:
    lm = FrozenLM(random_model("grouped-query"))
    head = DeepPrefix(32, lm.layers).double()
    embeds, cu_seqlens = packed_inputs()
    tokens = prefix_tokens(1)
    lm(embeds, cu_seqlens, head(tokens)).square().sum().backward()
    for name, tensor in [("tokens", tokens), *head.named_parameters()]:
        assert tensor.grad is not None and float(tensor.grad.abs().max()) > 0, name


def test_what_does_not_fit_is_refused() -> None:
    lm = FrozenLM(random_model("grouped-query"))
    embeds, cu_seqlens = packed_inputs()
    prefix, _ = deep(lm, 3)
    with pytest.raises(ValueError, match="prefix must be shared or one for each of 4, got 3"):
        lm(embeds, cu_seqlens, prefix)
    with pytest.raises(ValueError, match="prefix must have 2 layers, got 1"):
        lm(embeds, cu_seqlens, KeyValuePrefix(prefix.keys[:1], prefix.values[:1]))
    wrong = KeyValuePrefix((prefix.keys[0], prefix.keys[1][:, :, :1]), (prefix.values[0], prefix.values[1][:, :, :1]))
    with pytest.raises(ValueError, match=r"prefix of layer 1 must have 2 heads of 8, got \(1, 8\)"):
        lm(embeds[:20], torch.tensor([0, 7, 8, 20], dtype=torch.int32), wrong)
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        KeyValuePrefix((), ())
    long = random_prefix(lm, 1, 60, dtype=torch.float64)[0]
    with pytest.raises(ValueError, match="at most 64 tokens with its prefix and suffix, got 73"):
        lm(embeds, cu_seqlens, long)
