"""SASRec: a state depends on its own history alone, and on nothing younger."""

import pytest
import torch
from torch import Tensor

from laser_fast.recommenders import SASRec, SequentialRecommender

_NUM_ITEMS = 23


def _model(seed: int = 0, **settings: int | float) -> SASRec:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SASRec(_NUM_ITEMS, **{"width": 16, "num_heads": 2, "max_length": 12, **settings})
        for parameter in model.parameters():  # weights of a trained model's size, so that differences would show
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _histories(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, _NUM_ITEMS, (length,), generator=generator) for length in lengths]


def _pack(histories: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *(len(history) for history in histories)])
    return torch.cat([*histories, torch.empty(0, dtype=torch.int64)]), lengths.cumsum(0).int()


def test_packed_equals_one_by_one() -> None:
    model, histories = _model(), _histories(1, 7, 0, 12, 3, 0)
    states, scores = model.states(*_pack(histories)), model.score(*_pack(histories))
    assert states.shape == (23, 16)
    assert scores.shape == (6, _NUM_ITEMS)
    alone = torch.cat([model.states(*_pack([history])) for history in histories])
    torch.testing.assert_close(states, alone, rtol=1e-5, atol=1e-5)
    alone = torch.cat([model.score(*_pack([history])) for history in histories])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)


def test_states_equal_a_plain_transformer() -> None:
    """The same weights in a dense, masked formulation written out for one sequence."""
    model, (history,) = _model(), _histories(9)
    hidden = model.item_embedding.weight[history]
    # a pair of coordinates as one complex number: a rotation is a product
    turn = torch.polar(torch.ones(9, 4), torch.outer(torch.arange(9.0), 100.0 ** -(torch.arange(4) / 4)))
    for block in model.blocks:
        query, key, value = block.qkv(block.attention_norm(hidden)).chunk(3, dim=1)
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            turned_query, turned_key = (torch.complex(*x[:, head].chunk(2, dim=1)) * turn for x in (query, key))
            logits = (turned_query @ turned_key.conj().T).real / 8**0.5
            logits = logits.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
            heads.append(logits.softmax(dim=1) @ value[:, head])
        hidden = hidden + block.out(torch.cat(heads, dim=1))
        hidden = hidden + block.down(torch.nn.functional.gelu(block.up(block.mlp_norm(hidden))))
    torch.testing.assert_close(model.states(*_pack([history])), model.norm(hidden), rtol=1e-5, atol=1e-5)


def test_states_are_causal() -> None:
    model, (history,) = _model(), _histories(10)
    changed = history.clone()
    changed[6:] = (changed[6:] + 1) % _NUM_ITEMS
    before, after = model.states(*_pack([history])), model.states(*_pack([changed]))
    torch.testing.assert_close(before[:6], after[:6], rtol=1e-6, atol=1e-6)
    assert (before[6:] - after[6:]).abs().amax(dim=1).min() > 1e-2
    prefix = model.states(*_pack([history[:4]]))
    torch.testing.assert_close(prefix, before[:4], rtol=1e-5, atol=1e-5)


def test_order_matters() -> None:
    model, (history,) = _model(), _histories(5)
    swapped = history[[1, 0, 2, 3, 4]]
    assert (model.score(*_pack([history])) - model.score(*_pack([swapped]))).abs().max() > 1e-2


def test_score_is_the_last_state_times_the_item_embeddings() -> None:
    model, histories = _model(), _histories(3, 5)
    states = model.states(*_pack(histories))
    expected = states[[2, 7]] @ model.item_embedding.weight.T
    torch.testing.assert_close(model.score(*_pack(histories)), expected)


def test_score_reads_the_newest_items_of_long_histories() -> None:
    model, (history,) = _model(), _histories(40)
    torch.testing.assert_close(model.score(*_pack([history])), model.score(*_pack([history[-12:]])))


def test_empty_histories_score_zero_and_nothing_is_nan() -> None:
    model = _model()
    scores = model.score(*_pack(_histories(0, 4, 0)))
    assert scores[0].abs().max() == 0
    assert scores[2].abs().max() == 0
    assert scores[1].abs().max() > 0
    assert torch.isfinite(scores).all()
    assert model.score(*_pack([])).shape == (0, _NUM_ITEMS)
    assert model.states(*_pack(_histories(0))).shape == (0, 16)


def test_frozen_results_are_the_same_in_training_mode_and_carry_no_gradient() -> None:
    model, histories = _model(dropout=0.5), _histories(4, 6)
    expected = model.states(*_pack(histories))
    model.train()
    states, scores = model.states(*_pack(histories)), model.score(*_pack(histories))
    assert model.training
    assert torch.equal(states, expected)
    assert not states.requires_grad
    assert not scores.requires_grad
    assert not torch.equal(model(*_pack(histories)), expected)  # forward itself drops out


def test_gradients_are_finite_with_empty_histories() -> None:
    model = _model().train()
    model.logits(model(*_pack(_histories(0, 4, 0, 1)))).logsumexp(dim=1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("value", [-1, _NUM_ITEMS])
def test_unknown_items_are_refused(value: int) -> None:
    items, cu_seqlens = torch.tensor([0, value]), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"SASRec\.states: items must be in 0\.\.22, got {value}"):
        _model().states(items, cu_seqlens)
    with pytest.raises(ValueError, match=rf"SASRec\.score: items must be in 0\.\.22, got {value}"):
        _model().score(items, cu_seqlens)


def test_states_of_too_long_histories_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 12 items, got 13; keep the newest ones"):
        _model().states(*_pack(_histories(3, 13)))


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="num_items must be at least 1, got 0"):
        SASRec(0)
    with pytest.raises(ValueError, match="width must be an even multiple of num_heads, got 20 and 4"):
        SASRec(5, width=20, num_heads=4)


def test_protocol() -> None:
    model = _model()
    assert isinstance(model, SequentialRecommender)
    assert model.state_size == 16
    assert model.split_hash is None
