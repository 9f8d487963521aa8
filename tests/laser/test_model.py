"""LaserModel: what gets a gradient, what stays frozen, that batches do not matter, and serving by external ids."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from laser_fast.data import PackedSequences, training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.laser.build import Inputs
from laser_fast.models.network import LaserNetwork
from laser_fast.nn.bituning import BiTuning
from laser_fast.nn.prefixes import LinearPrefix
from laser_fast.recommenders import SASRec, Scorer


def training_batch(model: LaserModel, inputs: Inputs, rows: list[int]) -> PackedBatch:
    return model.builder.training_batch(training_rows(inputs.split.train, 4).select(rows), with_positives=True)


@pytest.mark.parametrize("readout", ["suffix", "mean"])
@pytest.mark.parametrize("prefix", ["mformer", "linear", "shared", "none"])
def test_gradients_reach_all_that_is_trained_and_nothing_else(
    make_laser: Callable[..., Any], prefix: str, readout: str
) -> None:
    model, inputs = make_laser(bituning={"prefix": prefix, "readout": readout})
    model.refresh_items()
    frozen = {name: parameter.clone() for name, parameter in model.lm.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(training_batch(model, inputs, [0, 5, 9, 30])).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    touched = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert not any(name.startswith(("lm.", "recommender.")) for name in trained)
    # a bias that every key of an attention shares changes no softmax, and the head sees no other dead parameter
    assert {"bituning.suffix_tokens", "head.weight"} <= touched
    if prefix == "mformer":
        assert {"mformer.router.weight", "mformer.query_experts", "mformer.lm_projection.weight"} <= touched
        assert any(name.startswith("mformer.qformer.layers.0.cross_attention") for name in touched)
    if prefix == "linear":
        assert {"linear_prefix.weight", "linear_prefix.tokens"} <= touched
    if prefix == "shared":
        assert "bituning.prefix_tokens" in touched
    optimizer.step()
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.lm.named_parameters())
    assert set(model.state_dict()) == trained


@pytest.mark.parametrize("lm", ["bert", "llama"])
def test_composition_of_the_batch_does_not_matter(make_laser: Callable[..., Any], lm: str) -> None:
    model, inputs = make_laser(lm, bituning={"num_suffix_tokens": 2})
    assert model.lm.causal == (lm == "llama")
    histories = PackedSequences.from_lists([[0, 1, 2], [7], [], [3, 4, 5, 6, 8, 9]])
    together = model.encode_users(histories)
    for row in range(4):
        torch.testing.assert_close(model.encode_users(histories.select([row]))[0], together[row], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode_users(histories, batch_size=3), together, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    model.refresh_items()
    model.train()(training_batch(model, inputs, [0, 5, 9])).loss.backward()
    for parameter in (model.bituning.suffix_tokens, model.mformer.query_experts):
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0


def test_score_is_a_scorer_and_needs_an_item_matrix(make_laser: Callable[..., Any]) -> None:
    model, _ = make_laser()
    assert isinstance(model, Scorer)
    items, cu_seqlens = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"must hold 25 items, got 0; call refresh_items\(\) first"):
        model.score(items, cu_seqlens)
    model.refresh_items()
    scores = model.score(items, cu_seqlens)
    assert scores.shape == (2, 25)
    assert float(scores.abs().max()) <= 1 / 0.05 + 1e-3
    with pytest.raises(ValueError, match="items must be in 0..24, got 25"):
        model.score(torch.tensor([25]), torch.tensor([0, 1], dtype=torch.int32))


def test_items_the_recommender_never_saw_have_no_state(make_laser: Callable[..., Any]) -> None:
    model, _ = make_laser()
    known = np.ones(25, dtype=bool)
    known[4] = False
    builder = type(model.builder)(
        model.builder.texts, model.builder.user_layout, model.builder.item_layout, known, max_history=2
    )
    batch = builder.histories(PackedSequences.from_lists([[1, 4, 2, 4, 3], [4], []]))
    assert batch.items.tolist() == [2, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 2]
    assert (batch.token_cu_seqlens.diff() > 0).all()


LINEAR = LinearPrefix(8, 16, num_tokens=2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"mformer": True}, "recommender must be given with mformer"),
        ({"linear_prefix": LINEAR}, "recommender must be given with linear_prefix"),
        ({"mformer": True, "linear_prefix": LINEAR}, "linear_prefix must be None with mformer"),
        ({"recommender": SASRec(7, width=8)}, "the recommender must know the 25 items of the catalogue, got 7"),
        ({"head": "mlp"}, 'head must be "linear" or "none", got \'mlp\''),
        ({"item_side": "text"}, 'item_side must be "lm", or "text" where there is text, got \'text\''),
    ],
    ids=str,
)
def test_wrong_parts_are_refused(make_laser: Callable[..., Any], parts: dict[str, Any], message: str) -> None:
    model, _ = make_laser()
    given = parts | ({"mformer": model.mformer} if "mformer" in parts else {})
    with pytest.raises(ValueError, match=message):
        LaserModel(model.lm, model.builder, model.item_ids, BiTuning(16), **given)


def test_wrong_names_and_batches_are_refused(make_laser: Callable[..., Any]) -> None:
    model, _ = make_laser()
    with pytest.raises(ValueError, match="item_ids must name the 25 items of the catalogue, got 1"):
        LaserModel(model.lm, model.builder, ["a"], BiTuning(16))
    batch = model.builder.histories(PackedSequences.from_lists([[1]]))
    with pytest.raises(ValueError, match="the batch must have targets, got None"):
        model(batch)
    with pytest.raises(ValueError, match="encode_texts needs a text residual"):
        model.encode_texts(batch)
    with pytest.raises(RuntimeError, match="StepContext: item_matrix must give the vectors of the catalogue, got None"):
        LaserNetwork.forward(model, replace(batch, targets=torch.tensor([1])))
