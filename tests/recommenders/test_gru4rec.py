"""GRU4Rec: a state depends on its own history alone, and on nothing younger."""

import pytest
import torch
from torch import Tensor

from laser_fast.recommenders import GRU4Rec, SequentialRecommender

_NUM_ITEMS = 23


def _model(**settings: int | float) -> GRU4Rec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GRU4Rec(_NUM_ITEMS, **{"width": 6, "hidden_width": 10, "num_layers": 2, "max_length": 12, **settings})
        for parameter in model.parameters():  # weights of a trained model's size, so that differences would show
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def _histories(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, _NUM_ITEMS, (length,), generator=generator) for length in lengths]


def _pack(histories: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *(len(history) for history in histories)])
    return torch.cat([*histories, torch.empty(0, dtype=torch.int64)]), lengths.cumsum(0).int()


def _written_out(model: GRU4Rec, history: Tensor) -> Tensor:
    """Cho et al. 2014, equations of a gated recurrent unit, item after item."""
    inputs = list(model.item_embedding.weight[history])
    for layer in range(model.gru.num_layers):
        w_in, w_hid, b_in, b_hid = (
            getattr(model.gru, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden, outputs = w_in.new_zeros(model.gru.hidden_size), []
        for value in inputs:
            reset_in, update_in, new_in = (w_in @ value + b_in).chunk(3)
            reset_hid, update_hid, new_hid = (w_hid @ hidden + b_hid).chunk(3)
            reset, update = torch.sigmoid(reset_in + reset_hid), torch.sigmoid(update_in + update_hid)
            hidden = (1 - update) * torch.tanh(new_in + reset * new_hid) + update * hidden
            outputs.append(hidden)
        inputs = outputs
    return model.dense(torch.stack(inputs))


def test_states_equal_the_recurrence_written_out() -> None:
    model, histories = _model().double(), _histories(3, 0, 12, 1, 7, 7, 0)
    states = model.states(*_pack(histories))
    expected = torch.cat([_written_out(model, history) for history in histories if len(history)])
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)
    last = expected[[2, 14, 15, 22, 29]] @ model.item_embedding.weight.T
    scores = model.score(*_pack(histories))
    torch.testing.assert_close(scores[[0, 2, 3, 4, 5]], last, rtol=1e-12, atol=1e-12)
    assert scores[[1, 6]].abs().max() == 0


def test_states_do_not_depend_on_the_batch() -> None:
    model, histories = _model(), _histories(1, 7, 0, 12, 3)
    together = model.states(*_pack(histories))
    alone = torch.cat([model.states(*_pack([history])) for history in histories])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    changed = histories[1].clone()
    changed[4:] = (changed[4:] + 1) % _NUM_ITEMS
    after = model.states(*_pack([histories[0], changed, *histories[2:]]))
    assert torch.equal(after[:5], together[:5]) and torch.equal(after[8:], together[8:])
    assert (after[5:8] - together[5:8]).abs().amax(dim=1).min() > 1e-2


def test_empty_and_long_histories() -> None:
    model, (history,) = _model(), _histories(40)
    torch.testing.assert_close(model.score(*_pack([history])), model.score(*_pack([history[-12:]])))
    assert model.score(*_pack([])).shape == (0, _NUM_ITEMS)
    assert model.states(*_pack(_histories(0))).shape == (0, 6)
    with pytest.raises(ValueError, match=r"GRU4Rec\.states: histories must have at most 12 items, got 40"):
        model.states(*_pack([history]))
    with pytest.raises(ValueError, match=r"GRU4Rec\.score: items must be in 0\.\.22, got 23"):
        model.score(torch.tensor([23]), torch.tensor([0, 1], dtype=torch.int32))


def test_dropout_is_for_training_alone_and_gradients_reach_everything() -> None:
    model, histories = _model(dropout=0.5), _histories(0, 4, 6)
    expected = model.states(*_pack(histories))
    model.train()
    assert torch.equal(model.states(*_pack(histories)), expected) and model.training
    trained = model(*_pack(histories))
    assert not torch.equal(trained, expected)
    model.logits(trained).logsumexp(dim=1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_sizes_and_protocol() -> None:
    model = GRU4Rec(5, width=8, dropout=0)
    assert isinstance(model, SequentialRecommender) and model.state_size == 8
    assert model.settings["hidden_width"] == 16  # twice the width where nothing else is said
    for name in ("num_items", "width", "hidden_width", "num_layers", "max_length"):
        with pytest.raises(ValueError, match=f"GRU4Rec: {name} must be at least 1, got 0"):
            GRU4Rec(**{"num_items": 5, name: 0})
