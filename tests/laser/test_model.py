"""LaserModel: what gets a gradient, what stays frozen, that batches do not matter, and serving by external ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, LlamaConfig

from laser_fast.config import LaserConfig, build_config
from laser_fast.data import PackedSequences, training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.laser.build import Inputs, build_laser, load_inputs, load_language_model
from laser_fast.nn.bituning import BiTuning
from laser_fast.nn.prefixes import LinearPrefix
from laser_fast.recommenders import SASRec, Scorer
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration


def build(settings: dict[str, Any], **sections: dict[str, Any]) -> tuple[LaserModel, Inputs]:
    values = {**settings}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    config = build_config(LaserConfig, values)
    torch.manual_seed(0)
    inputs = load_inputs(config)
    return build_laser(config, inputs, *load_language_model(config.lm)), inputs


def training_batch(model: LaserModel, inputs: Inputs, rows: list[int], *, positives: bool = True) -> PackedBatch:
    return model.builder.training_batch(training_rows(inputs.split.train, 4).select(rows), with_positives=positives)


@pytest.mark.parametrize("readout", ["suffix", "mean"])
@pytest.mark.parametrize("prefix", ["mformer", "linear", "shared", "none"])
def test_gradients_reach_all_that_is_trained_and_nothing_else(
    tiny_settings: dict[str, Any], prefix: str, readout: str
) -> None:
    no_pretraining = {**tiny_settings["training"], "pretrain": {"epochs": 0}}
    model, inputs = build(tiny_settings, bituning={"prefix": prefix, "readout": readout}, training=no_pretraining)
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


def test_composition_of_the_batch_does_not_matter(tiny_settings: dict[str, Any]) -> None:
    model, _ = build(tiny_settings)
    histories = PackedSequences.from_lists([[0, 1, 2], [7], [], [3, 4, 5, 6, 8, 9]])
    together = model.encode_users(histories)
    for row in range(4):
        torch.testing.assert_close(model.encode_users(histories.select([row]))[0], together[row], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode_users(histories, batch_size=3), together, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_causal_language_model_serves_as_well(tiny_settings: dict[str, Any]) -> None:
    config = build_config(LaserConfig, tiny_settings | {"bituning": {"num_suffix_tokens": 2}})
    inputs = load_inputs(config)
    _, tokenizer = load_language_model(config.lm)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = AutoModel.from_config(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    model = build_laser(config, inputs, decoder, tokenizer)
    assert model.lm.causal
    histories = PackedSequences.from_lists([[0, 1, 2], [7], [], [3, 4, 5, 6, 8, 9]])
    together = model.encode_users(histories)
    for row in range(4):
        torch.testing.assert_close(model.encode_users(histories.select([row]))[0], together[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    model.refresh_items()
    model.train()(training_batch(model, inputs, [0, 5, 9])).loss.backward()
    suffix, experts = model.bituning.suffix_tokens.grad, model.mformer.query_experts.grad  # type: ignore[union-attr]
    assert suffix is not None and bool((suffix.abs().amax(dim=1) > 0).all())
    assert experts is not None and float(experts.abs().max()) > 0


def test_positives_get_a_gradient_through_the_item_side(tiny_settings: dict[str, Any]) -> None:
    model, inputs = build(tiny_settings)
    model.refresh_items()
    model.eval()
    with_positives = training_batch(model, inputs, [0, 5, 9])
    without = training_batch(model, inputs, [0, 5, 9], positives=False)
    output = model(with_positives)
    torch.testing.assert_close(output.cross_entropy, model(without).cross_entropy)
    # among the positives alone: rows of the matrix that these very parameters encoded
    users = F.normalize(model.encode(without)[0], dim=-1)
    assert without.targets is not None
    targets = without.targets.unique()
    among = F.cross_entropy(
        users @ F.normalize(model.item_matrix[targets], dim=-1).T / 0.05, torch.searchsorted(targets, without.targets)
    )
    torch.testing.assert_close(output.loss, model(without).loss + among, rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(model(batch).loss, model.bituning.suffix_tokens)[0] for batch in (with_positives, without)
    ]
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[1].norm()


def test_loss_is_the_cross_entropy_over_the_whole_catalogue(tiny_settings: dict[str, Any]) -> None:
    model, inputs = build(tiny_settings, objective={"balance_weight": 0.5})
    model.refresh_items()
    model.eval()
    batch = training_batch(model, inputs, [1, 2], positives=False)
    output = model(batch)
    cosine = F.normalize(model.encode(batch)[0], dim=-1) @ F.normalize(model.item_matrix, dim=-1).T
    assert batch.targets is not None
    torch.testing.assert_close(output.cross_entropy, F.cross_entropy(cosine / 0.05, batch.targets))
    torch.testing.assert_close(output.loss, output.cross_entropy + 0.5 * output.balance_loss)
    assert output.load is not None and float(output.load.sum()) == pytest.approx(2.0)


def test_score_is_a_scorer_and_needs_an_item_matrix(tiny_settings: dict[str, Any]) -> None:
    model, _ = build(tiny_settings)
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


def test_recommend_takes_external_ids_of_anybody(tiny_settings: dict[str, Any]) -> None:
    model, _ = build(tiny_settings)
    model.refresh_items()
    first, second = model.recommend([["i3", "i4"], []], k=4)
    assert len(first) == len(second) == 4
    assert [r.score for r in first] == sorted((r.score for r in first), reverse=True)
    best = model.score(torch.tensor([3, 4]), torch.tensor([0, 2], dtype=torch.int32))[0].argsort(
        descending=True, stable=True
    )
    assert [r.item_id for r in first] == [f"i{index}" for index in best[:4].tolist()]


def test_recommend_obeys_exclusions(tiny_settings: dict[str, Any]) -> None:
    model, _ = build(tiny_settings)
    model.refresh_items()
    allow = ["i1", "i2", "i3", "i4"]
    (answer,) = model.recommend([["i3"]], k=10, exclude_seen=True, exclude=["i1"], allow=allow)
    assert {r.item_id for r in answer} == {"i2", "i4"}


def test_unknown_ids_are_dropped_with_one_warning(tiny_settings: dict[str, Any]) -> None:
    model, _ = build(tiny_settings)
    model.refresh_items()
    with pytest.warns(
        UserWarning, match="2 ids are not in the catalogue and were dropped, the first is 'nope'"
    ) as caught:
        answer = model.recommend([["nope", "i3"], ["no"]], k=1)
    assert len(caught) == 1
    assert answer == model.recommend([["i3"], []], k=1)


def test_recommend_refuses_what_makes_no_sense(tiny_settings: dict[str, Any]) -> None:
    model, _ = build(tiny_settings)
    model.refresh_items()
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        model.recommend([["i3"]], k=0)
    with pytest.raises(TypeError, match="must be a list of item ids, got a str: 'i3'"):
        model.recommend(["i3"])
    with pytest.raises(ValueError, match="allow must name items of the catalogue, got 'x'"):
        model.recommend([["i3"]], allow=["x"])


def test_recommend_uses_the_calibration(tiny_settings: dict[str, Any]) -> None:
    model, _ = build(tiny_settings)
    model.refresh_items()
    settings = Calibration({"laser": 1.0}, history_bias=1000.0)
    model.calibration = CalibratedScorer({"laser": model}, settings, torch.ones(25))
    (answer,) = model.recommend([["i9", "i3"]], k=1)
    assert answer[0].item_id in ("i3", "i9")


def test_items_the_recommender_never_saw_have_no_state(tiny_settings: dict[str, Any]) -> None:
    model, _ = build(tiny_settings)
    known = np.ones(25, dtype=bool)
    known[4] = False
    builder = type(model.builder)(
        model.builder.texts, model.builder.user_layout, model.builder.item_layout, known, max_history=2
    )
    batch = builder.histories(PackedSequences.from_lists([[1, 4, 2, 4, 3], [4], []]))
    assert batch.items.tolist() == [2, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 2]
    assert (batch.token_cu_seqlens.diff() > 0).all()


def test_wrong_parts_are_refused(tiny_settings: dict[str, Any], tiny_lm: Path) -> None:
    model, _ = build(tiny_settings)
    tuning = BiTuning(16)
    with pytest.raises(ValueError, match="item_ids must name the 25 items of the catalogue, got 1"):
        LaserModel(model.lm, model.builder, ["a"], tuning)
    with pytest.raises(ValueError, match="recommender must be given with mformer"):
        LaserModel(model.lm, model.builder, model.item_ids, tuning, mformer=model.mformer)
    linear = LinearPrefix(8, 16, num_tokens=2)
    with pytest.raises(ValueError, match="recommender must be given with linear_prefix"):
        LaserModel(model.lm, model.builder, model.item_ids, tuning, linear_prefix=linear)
    with pytest.raises(ValueError, match="linear_prefix must be None with mformer"):
        LaserModel(model.lm, model.builder, model.item_ids, tuning, mformer=model.mformer, linear_prefix=linear)
    with pytest.raises(ValueError, match="the recommender must know the 25 items of the catalogue, got 7"):
        LaserModel(model.lm, model.builder, model.item_ids, tuning, recommender=SASRec(7, width=8))
    with pytest.raises(ValueError, match='head must be "linear" or "none", got \'mlp\''):
        LaserModel(model.lm, model.builder, model.item_ids, tuning, head="mlp")
    with pytest.raises(ValueError, match="the batch must have targets, got None"):
        model(model.builder.histories(PackedSequences.from_lists([[1]])))
