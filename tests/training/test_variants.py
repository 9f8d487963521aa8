"""Every configuration of the papers' ablations takes a step of each stage, and the step trains what it should."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from laser_fast.config import LaserConfig, build_config
from laser_fast.data import EvaluationRows, training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.data.negatives import NegativeSampler
from laser_fast.laser import LaserModel
from laser_fast.laser.build import build_laser, load_inputs, load_language_model
from laser_fast.training.loop import LossFunction, StageTrainer
from laser_fast.training.stage1 import build_heads, pretraining_loss, text_vocabulary


def build(settings: dict[str, Any], **sections: dict[str, Any]) -> tuple[LaserConfig, LaserModel, EvaluationRows]:
    values = {**settings, **{name: {**settings.get(name, {}), **section} for name, section in sections.items()}}
    config = build_config(LaserConfig, values)
    inputs = load_inputs(config)
    torch.manual_seed(0)
    model = build_laser(config, inputs, *load_language_model(config.lm))
    return config, model, training_rows(inputs.split.train, 4).select(np.arange(12))


def step(modules: nn.Module, config: LaserConfig, batch: PackedBatch, loss: LossFunction) -> tuple[set[str], float]:
    """Names of the parameters that a step moves, and its loss; the learning rate is high, and no weight decays."""
    before = {name: parameter.clone() for name, parameter in modules.named_parameters()}
    optimizer = config.training.optimizer.model_copy(update={"weight_decay": 0.0, "learning_rate": 0.1})
    trainer = StageTrainer(Accelerator(), modules, optimizer, 3)
    batches: Iterator[PackedBatch] = iter([batch])
    values = trainer.run_epoch(batches, 1, loss, title="", progress=False)
    return {n for n, p in modules.named_parameters() if not torch.equal(p, before[n])}, values["loss"]


def stage_2(model: LaserModel) -> LossFunction:
    def loss(batch: PackedBatch) -> dict[str, Tensor]:
        return {"loss": model(batch).loss}

    return loss


EXPERTS = [(1, 1), (3, 1), (3, 2), (3, 3)]
SHARED = {"mformer.router.weight", "mformer.query_experts", "mformer.state_projection.weight"}


@pytest.mark.parametrize(("num_experts", "top_k"), EXPERTS, ids=[f"{k} of {e}" for e, k in EXPERTS])
def test_any_number_of_experts_trains_in_both_stages(
    tiny_settings: dict[str, Any], num_experts: int, top_k: int
) -> None:
    experts = {"num_experts": num_experts, "top_k": top_k}
    config, model, rows = build(tiny_settings, mformer=experts, objective={"num_negatives": 2})
    heads, batch = build_heads(config, model), model.builder.histories(rows.histories)
    assert model.mformer is not None
    moved, value = step(
        nn.ModuleDict({"mformer": model.mformer, "heads": heads}), config, batch, pretraining_loss(model, heads)
    )
    wanted = SHARED | {"heads.match.weight", "heads.decoder.0.weight", "heads.query_projection.weight"}
    if num_experts == 1:
        wanted -= {"mformer.router.weight"}  # its softmax over one expert is constant
    assert wanted <= moved and np.isfinite(value)
    model.refresh_items()
    batch = model.builder.training_batch(rows, with_positives=True, negatives=np.tile([[21, 22]], (12, 1)))
    moved, value = step(model, config, batch, stage_2(model))
    wanted = (SHARED & wanted) | {"mformer.lm_projection.weight", "bituning.suffix_tokens", "head.weight"}
    assert wanted <= moved and np.isfinite(value)


@pytest.mark.parametrize("candidates", ["catalog", "sampled"])
@pytest.mark.parametrize("prefix", ["linear", "shared", "none"])
def test_without_mformer_the_rest_trains(tiny_settings: dict[str, Any], prefix: str, candidates: str) -> None:
    training = {**tiny_settings["training"], "pretrain": {"epochs": 0}}
    objective = {"num_negatives": 2, "candidates": candidates}
    config, model, rows = build(tiny_settings, bituning={"prefix": prefix}, training=training, objective=objective)
    model.refresh_items()
    batch = model.builder.training_batch(rows, with_positives=True, negatives=np.tile([[21, 22]], (12, 1)))
    moved, value = step(model, config, batch, stage_2(model))
    of_prefix = {"linear": {"linear_prefix.weight", "linear_prefix.tokens"}, "shared": {"bituning.prefix_tokens"}}
    assert moved == {"bituning.suffix_tokens", "head.weight", "head.bias"} | of_prefix.get(prefix, set())
    assert np.isfinite(value)


def test_generation_chooses_among_the_tokens_of_the_texts(tiny_settings: dict[str, Any]) -> None:
    _, model, rows = build(tiny_settings)
    vocabulary = text_vocabulary(model)
    assert (vocabulary.input_ids.diff() > 0).all()
    batch = model.builder.histories(rows.histories)
    assert bool(torch.isin(batch.input_ids, vocabulary.input_ids).all())
    assert len(vocabulary.input_ids) == 10 + 2 + 1  # words, [CLS] and [SEP], the comma; not [PAD], [UNK], the colon
    assert torch.equal(vocabulary.embeds, model.lm.embed(vocabulary.input_ids))


def test_the_negatives_of_a_micro_batch_are_those_of_its_rows(tiny_settings: dict[str, Any]) -> None:
    _, model, rows = build(tiny_settings, objective={"num_negatives": 3, "candidates": "sampled"})
    inputs = training_rows(load_inputs(build_config(LaserConfig, tiny_settings)).split.train, 4)
    negatives = NegativeSampler(inputs.train, model.num_items, 3, seed=1).draw(rows.users, 0, np.arange(12))
    batch = model.builder.training_batch(rows, with_positives=True, negatives=negatives)
    model.budget.limit = 100
    parts = model.budget.split(batch, model.virtual_tokens)
    assert len(parts) > 2
    for index in parts:
        part = batch.select(index)
        assert part.negatives is not None and part.targets is not None and part.positives is not None
        assert part.negatives.tolist() == negatives[index].tolist()
        items = part.positives.items.numpy()  # of an item: itself
        own = np.concatenate([rows.targets[index, None], negatives[index]], axis=1)
        assert items[part.places].tolist() == own.tolist()
        assert len(items) == len(np.unique(own))


def test_a_run_begins_with_the_layers_of_a_bert(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    from laser_fast.training.train import train_laser

    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=20, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    mformer = {**tiny_settings["mformer"], "initialize_from": str(tmp_path / "bert")}
    still = {"epochs": 1, "rows_per_epoch": 1}
    stages = {"pretrain": {"epochs": 0}, "phase_a": still, "phase_b": {"epochs": 0}}
    training = {**tiny_settings["training"], **stages, "optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0}}
    settings = tiny_settings | {"mformer": mformer, "training": training, "evaluation": {"calibrate": False}}
    model, _ = train_laser(build_config(LaserConfig, settings), progress=False)
    assert model.mformer is not None
    weights = model.mformer.state_dict()
    expected = bert.encoder.layer[1].intermediate.dense.weight
    torch.testing.assert_close(weights["qformer.layers.1.feed_forward.wide.weight"], expected.detach())
    config = build_config(LaserConfig, settings)
    heads = build_heads(config, model)
    torch.testing.assert_close(heads.state_dict()["text.feed_forwards.1.wide.weight"], expected.detach())
