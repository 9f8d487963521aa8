"""The linear prefix against one user at a time; the scale of either prefix at the start."""

import pytest
import torch
from torch import Tensor

from laser_fast.lm.key_value_prefix import LayerShape
from laser_fast.nn.prefixes import DeepPrefix, LinearPrefix

LENGTHS = [4, 0, 1, 9, 0]


def make() -> LinearPrefix:
    torch.manual_seed(0)
    return LinearPrefix(6, 10, num_tokens=3, rms=0.5).double()


def batch() -> tuple[Tensor, Tensor]:
    states = torch.randn(sum(LENGTHS), 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return states, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def test_equals_one_user_at_a_time() -> None:
    model = make()
    states, cu_seqlens = batch()
    written = model(states, cu_seqlens)
    for user, end in enumerate(cu_seqlens[1:].tolist()):
        own = model.tokens.clone()
        if LENGTHS[user]:
            own = own + (states[end - 1] @ model.weight).view(3, 10)
        torch.testing.assert_close(written[user], own, rtol=0, atol=1e-12)


def test_only_the_newest_state_is_read_and_empty_histories_read_none() -> None:
    model = make()
    states, cu_seqlens = batch()
    newest = [end - 1 for end, length in zip(cu_seqlens[1:].tolist(), LENGTHS, strict=True) if length]
    older = torch.ones(len(states), dtype=torch.bool).index_fill(0, torch.tensor(newest), False)
    poisoned = states.masked_fill(older[:, None], float("nan"))
    assert torch.equal(model(poisoned, cu_seqlens), model(states, cu_seqlens))
    nobody = model(states[:0], torch.zeros(3, dtype=torch.int32))
    assert torch.equal(nobody, model.tokens.expand(2, -1, -1))


def test_gradients_reach_the_map_and_the_tokens() -> None:
    model = make()
    states, cu_seqlens = batch()
    assert torch.autograd.gradcheck(
        lambda weight, tokens: torch.func.functional_call(
            model, {"weight": weight, "tokens": tokens}, (states, cu_seqlens)
        ),
        (model.weight, model.tokens),
    )


def test_begins_at_the_scale_of_the_embeddings() -> None:
    torch.manual_seed(0)
    model = LinearPrefix(64, 256, num_tokens=4, rms=0.02)
    written = model(torch.randn(512, 64), torch.arange(513, dtype=torch.int32)).detach()
    assert float(written.pow(2).mean().sqrt()) == pytest.approx(0.02 * 2**0.5, rel=0.1)  # tokens and map, each 0.02


def test_states_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LinearPrefix: states must be \[N, 6\], got \(2, 7\)"):
        make()(torch.zeros(2, 7), torch.tensor([0, 2], dtype=torch.int32))


def test_deep_prefix_starts_at_the_scale_of_the_models_own_keys_and_values() -> None:
    torch.manual_seed(0)
    layers = [LayerShape(2, 16, 3.0, 0.1), LayerShape(1, 8, 0.5, 2.0)]
    head = DeepPrefix(24, layers, token_rms=0.02)
    prefix = head(torch.randn(40, 6, 24) * 0.02)
    for layer, shape in enumerate(layers):
        assert prefix.keys[layer].shape == prefix.values[layer].shape == (40, 6, shape.num_heads, shape.head_size)
        # a random map of rank 64 keeps the scale within a third
        assert float(prefix.keys[layer].detach().square().mean().sqrt()) == pytest.approx(shape.key_rms, rel=0.33)
        assert float(prefix.values[layer].detach().square().mean().sqrt()) == pytest.approx(shape.value_rms, rel=0.33)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    assert parameters == 25 * 64 + 65 * 2 * (32 + 8)  # as the docstring counts them
    with pytest.raises(ValueError, match="at least one attention layer, got none"):
        DeepPrefix(8, [])
