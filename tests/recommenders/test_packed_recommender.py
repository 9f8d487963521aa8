"""SASRec and GRU4Rec: a state depends on its own history alone, and on nothing younger."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from laser_fast.recommenders import GRU4Rec, SASRec, SequentialRecommender
from laser_fast.recommenders.packed_recommender import PackedRecommender

_NUM_ITEMS, _WIDTH = 23, 16
_SETTINGS: dict[type[PackedRecommender], dict[str, Any]] = {SASRec: {}, GRU4Rec: {"hidden_width": 10, "num_layers": 2}}
Pack = Callable[..., tuple[Tensor, Tensor]]


def _model(kind: Any, **settings: float) -> Any:
    """With weights of a trained model's size, so that differences show."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(_NUM_ITEMS, **{"width": _WIDTH, "max_length": 12, **_SETTINGS[kind], **settings})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _histories(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, _NUM_ITEMS, (length,), generator=generator) for length in lengths]


both = pytest.mark.parametrize("kind", [SASRec, GRU4Rec])


def _sasrec_written_out(model: SASRec, history: Tensor) -> Tensor:
    """A dense, masked transformer of one sequence."""
    hidden = model.item_embedding.weight[history]
    length = len(history)
    # a pair of coordinates as one complex number: a rotation is a product
    angles = torch.outer(torch.arange(length).double(), 100.0 ** -(torch.arange(4).double() / 4))
    turn = torch.polar(torch.ones(length, 4).double(), angles)
    for block in model.blocks:
        query, key, value = block.qkv(block.attention_norm(hidden)).chunk(3, dim=1)
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            turned_query, turned_key = (torch.complex(*x[:, head].chunk(2, dim=1)) * turn for x in (query, key))
            logits = (turned_query @ turned_key.conj().T).real / 8**0.5
            logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
            heads.append(logits.softmax(dim=1) @ value[:, head])
        hidden = hidden + block.out(torch.cat(heads, dim=1))
        hidden = hidden + block.down(torch.nn.functional.gelu(block.up(block.mlp_norm(hidden))))
    return model.norm(hidden)


def _gru_written_out(model: GRU4Rec, history: Tensor) -> Tensor:
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


@pytest.mark.parametrize(
    ("kind", "written_out", "tolerance"),
    [(SASRec, _sasrec_written_out, 1e-6), (GRU4Rec, _gru_written_out, 1e-12)],  # rotary angles are float32
    ids=["sasrec", "gru4rec"],
)
def test_states_and_scores_equal_the_model_written_out(
    kind: Any, written_out: Callable[..., Tensor], tolerance: float, pack: Pack
) -> None:
    model, histories = _model(kind).double(), _histories(3, 0, 12, 1, 7, 7, 0)
    expected = torch.cat([written_out(model, history) for history in histories if len(history)])
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(model.states(*pack(*histories)), expected, **close)
    scores = model.score(*pack(*histories))
    last = expected[[2, 14, 15, 22, 29]] @ model.item_embedding.weight.T
    torch.testing.assert_close(scores[[0, 2, 3, 4, 5]], last, rtol=10 * tolerance, atol=10 * tolerance)
    assert scores[[1, 6]].abs().max() == 0


@both
def test_states_depend_on_neither_the_batch_nor_younger_items(kind: Any, pack: Pack) -> None:
    model, histories = _model(kind), _histories(1, 7, 0, 12, 3, 0)
    together = model.states(*pack(*histories))
    alone = torch.cat([model.states(*pack(history)) for history in histories])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.states(*pack(histories[1][:4])), together[1:5], rtol=1e-5, atol=1e-5)
    changed = histories[1].clone()
    changed[4:] = (changed[4:] + 1) % _NUM_ITEMS
    after = model.states(*pack(histories[0], changed, *histories[2:]))
    torch.testing.assert_close(after[:5], together[:5], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after[8:], together[8:], rtol=1e-6, atol=1e-6)
    assert (after[5:8] - together[5:8]).abs().amax(dim=1).min() > 1e-2
    swapped = histories[1][[1, 0, 2, 3, 4, 5, 6]]
    assert (model.score(*pack(swapped)) - model.score(*pack(histories[1]))).abs().max() > 1e-2  # order matters


@both
def test_empty_and_long_histories(kind: Any, pack: Pack) -> None:
    model, (history,) = _model(kind), _histories(40)
    torch.testing.assert_close(model.score(*pack(history)), model.score(*pack(history[-12:])))
    scores = model.score(*pack([], history[:4], []))
    assert scores[[0, 2]].abs().max() == 0 and scores[1].abs().max() > 0 and torch.isfinite(scores).all()
    assert model.score(*pack()).shape == (0, _NUM_ITEMS) and model.states(*pack([])).shape == (0, _WIDTH)
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.states: histories .* at most 12 items, got 40; keep the"):
        model.states(*pack(history))


@both
def test_dropout_is_for_training_alone_and_gradients_reach_everything(kind: Any, pack: Pack) -> None:
    model, histories = _model(kind, dropout=0.5), pack(*_histories(0, 4, 0, 6))
    expected = model.states(*histories)
    model.train()
    states = model.states(*histories)
    assert torch.equal(states, expected) and all(part.training for part in model.modules())
    assert not states.requires_grad and not model.score(*histories).requires_grad
    trained = model(*histories)
    assert not torch.equal(trained, expected)
    model.logits(trained).logsumexp(dim=1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@both
@pytest.mark.parametrize("value", [-1, _NUM_ITEMS])
def test_unknown_items_are_refused(kind: Any, value: int, pack: Pack) -> None:
    for call in ("states", "score"):
        with pytest.raises(ValueError, match=rf"{kind.__name__}\.{call}: items must be in 0\.\.22, got {value}"):
            getattr(_model(kind), call)(*pack([0, value]))


@both
def test_sizes_and_protocol(kind: Any) -> None:
    model = kind(5, width=8, dropout=0)
    assert isinstance(model, SequentialRecommender) and (model.state_size, model.split_hash) == (8, None)
    for name in ("num_items", "width", "num_layers", "max_length"):
        with pytest.raises(ValueError, match=f"{kind.__name__}: {name} must be at least 1, got 0"):
            kind(**{"num_items": 5, name: 0})


def test_widths() -> None:
    assert GRU4Rec(5, width=8).settings["hidden_width"] == 16  # twice the width where nothing else is said
    with pytest.raises(ValueError, match="SASRec: width must be an even multiple of num_heads, got 20 and 4"):
        SASRec(5, width=20, num_heads=4)
    with pytest.raises(ValueError, match="GRU4Rec: hidden_width must be at least 1, got 0"):
        GRU4Rec(5, hidden_width=0)
