"""Laser with the text residual: its embeddings, its loss, its training stage, and what is saved of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from laser_fast import LaserModel
from laser_fast.config import LaserConfig, build_config
from laser_fast.data import EvaluationRows, PackedSequences, training_rows
from laser_fast.laser.build import build_laser, load_inputs, load_language_model
from laser_fast.models.objective import StepContext
from laser_fast.models.text_scorers import TextRecommender
from laser_fast.reports import read_run
from laser_fast.training.train import train_laser

TEXT = {"residual": True, "max_history": 3}


def settings_with_text(settings: dict[str, Any], item_side: str = "lm", **sections: Any) -> dict[str, Any]:
    objective = {"mask_history": True, "popularity": True}
    text = {"epochs": 2, "rows_per_epoch": 24, "batch_size": 8}
    training = {**settings["training"], "text": text, "pretrain": {"epochs": 0}, "phase_a": {"epochs": 1}}
    return {
        **settings,
        "text": {**TEXT, "item_side": item_side},
        "objective": objective,
        "training": training,
    } | sections


@pytest.fixture
def build(make_laser: Callable[..., Any]) -> Callable[..., tuple[LaserModel, EvaluationRows]]:
    """`build(item_side)`: a model with a residual, of this side where it is given, and rows to train on."""

    def make(item_side: str | None = "lm", **text: Any) -> tuple[LaserModel, EvaluationRows]:
        objective = {"mask_history": True, "popularity": True}
        sections = {"text": {**TEXT, "item_side": item_side, **text}, "objective": objective} if item_side else {}
        model, inputs = make_laser(**sections)
        return model.eval(), training_rows(inputs.split.train, 4).select(np.array([0, 5, 9, 11]))

    return make


def pairs(histories: PackedSequences) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(histories.items), torch.from_numpy(histories.cu_seqlens)


@pytest.mark.parametrize("item_side", ["lm", "text"])
def test_embeddings_are_the_read_out_beside_the_residual(build: Callable[..., Any], item_side: str) -> None:
    model, rows = build(item_side)
    text = model.text
    assert text is not None and model.head is not None
    users, items = model.encode_users(rows.histories), model.encode_items()
    without, _ = build(None)  # the same parameters of the language model's side
    read_out = F.normalize(without.encode_users(rows.histories), dim=-1)  # its head is the identity
    torch.testing.assert_close(users, read_out + text.users(*pairs(rows.histories.truncate_left(3))).detach())
    if item_side == "text":
        assert torch.equal(items, text.embeddings())
    else:
        torch.testing.assert_close(items, F.normalize(without.encode_items(), dim=-1) + text.embeddings())


def test_the_loss_leaves_out_the_history_and_adds_popularity(build: Callable[..., Any]) -> None:
    model, rows = build("text")
    assert model.text is not None and model.popularity_weight is not None
    with torch.no_grad():
        model.popularity_weight.fill_(0.7)
    batch = model.builder.training_batch(rows, with_positives=False)
    users, _ = model.encode(batch)
    scores = F.normalize(users, dim=-1) @ F.normalize(model.text.items(), dim=-1).T / model.objective.temperature
    scores = scores + 0.7 * model.log_counts
    for row, history in enumerate(rows.histories.truncate_left(3).to_lists()):
        for item in set(history) - {int(rows.targets[row])}:
            scores[row, item] = -torch.inf
    output = model(batch)
    torch.testing.assert_close(output.cross_entropy, F.cross_entropy(scores, torch.from_numpy(rows.targets)))
    output.loss.backward()
    assert model.text.head.weight.grad is not None and model.popularity_weight.grad is not None
    assert model.popularity_weight.grad != 0


def test_a_frozen_item_matrix_is_what_users_are_trained_against(build: Callable[..., Any]) -> None:
    model, rows = build("text")
    batch = model.builder.training_batch(rows, with_positives=False)
    live = model(batch).cross_entropy
    step = StepContext(items_train=False)
    with pytest.raises(RuntimeError, match="the item matrix must hold"):
        model(batch, step=step)
    model.refresh_items()
    torch.testing.assert_close(model(batch, step=step).cross_entropy, live)
    model.item_matrix = torch.flip(model.item_matrix, [0])
    assert not torch.isclose(model(batch, step=step).cross_entropy, live)


def test_positives_are_read_as_texts_where_items_are(build: Callable[..., Any]) -> None:
    model, rows = build("text")
    batch = model.builder.training_batch(rows, with_positives=True)
    assert model.text is not None and batch.positives is not None and batch.positive_targets is not None
    users, _ = model.encode(batch)
    distinct = torch.unique(torch.from_numpy(rows.targets))
    among = (
        F.normalize(users, dim=-1) @ F.normalize(model.text.items()[distinct], dim=-1).T / model.objective.temperature
    )
    expected = F.cross_entropy(among, torch.searchsorted(distinct, torch.from_numpy(rows.targets)))
    output = model(batch)
    balance = model.objective.balance_weight * output.balance_loss
    torch.testing.assert_close(output.loss.detach() - output.cross_entropy - balance, expected.detach())


@pytest.mark.parametrize("item_side", ["lm", "text"])
def test_a_run_trains_the_residual_first_and_comes_back_whole(
    tiny_settings: dict[str, Any], tmp_path: Path, item_side: str
) -> None:
    settings = settings_with_text(tiny_settings, item_side, output=str(tmp_path / "run"))
    model, inputs = train_laser(build_config(LaserConfig, settings), progress=False)
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert log.index('"stage": "text"') < log.index('"stage": "phase_a"')
    loaded = LaserModel.from_pretrained(tmp_path / "run")
    assert loaded.text is not None and model.text is not None
    loaded.text.source = None  # its vectors came with it
    histories = inputs.split.test.histories
    assert torch.equal(loaded.encode_users(histories), model.encode_users(histories))
    assert torch.equal(loaded.item_matrix, model.item_matrix)
    assert not torch.equal(model.text.head.weight, torch.eye(*model.text.head.weight.shape))
    saved = load_file(tmp_path / "run" / "checkpoint" / "adapter.safetensors")
    assert {"text.head.weight", "text.recency", "popularity_weight"} <= saved.keys()


def test_a_residual_begins_with_that_of_another_run(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = settings_with_text(tiny_settings, output=str(tmp_path / "first"))
    settings["training"] |= {"phase_a": {"epochs": 0}, "phase_b": {"epochs": 0}}
    first, _ = train_laser(build_config(LaserConfig, settings), progress=False)
    second = {**settings, "output": str(tmp_path / "second")}
    second["text"] = {**TEXT, "item_side": "text", "initialize_from": str(tmp_path / "first")}
    second["training"] = {**settings["training"], "text": {"epochs": 0}}
    model, _ = train_laser(build_config(LaserConfig, second), progress=False)
    assert model.text is not None and first.text is not None
    assert not torch.equal(first.text.head.weight, torch.eye(*first.text.head.weight.shape))
    for name, value in first.text.state_dict().items():
        assert torch.equal(model.text.state_dict()[name], value)
    assert torch.equal(model.text.vectors, first.text.vectors)
    assert torch.equal(model.state_dict()["popularity_weight"], first.state_dict()["popularity_weight"])
    second["text"] = {**second["text"], "templates": ["a {title}"]}
    with pytest.raises(ValueError, match=r"must have this model's text settings and catalogue, got other templates"):
        train_laser(build_config(LaserConfig, {**second, "output": str(tmp_path / "third")}), progress=False)
    assert not (tmp_path / "third").exists()
    second["text"] = {**TEXT, "initialize_from": str(tmp_path)}
    with pytest.raises(FileNotFoundError, match="the folder must hold a saved Laser"):
        train_laser(build_config(LaserConfig, {**second, "output": str(tmp_path / "third")}), progress=False)


def test_templates_are_averaged(build: Callable[..., Any]) -> None:
    wordings = [["{title}"], ["a {title}"], ["{title}", "a {title}"]]
    vectors = []
    for templates in wordings:
        model, _ = build(templates=templates)
        assert model.text is not None
        vectors.append(model.text.fetch_vectors())
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-3)
    middle = F.cosine_similarity(vectors[2], vectors[0] + vectors[1], dim=-1)
    assert middle.mean() > 0.95  # means of unit rows, centred: not the same arithmetic


def test_the_cached_line_scores_by_the_residual_alone(build: Callable[..., Any]) -> None:
    model, rows = build()
    assert model.text is not None
    histories = PackedSequences.from_lists([*rows.histories.to_lists(), []])
    items, bounds = pairs(histories)
    scores = TextRecommender(model.text, 0.1).score(items, bounds)
    users = model.text.users(*pairs(histories.truncate_left(3)))
    expected = F.normalize(users, dim=-1) @ F.normalize(model.text.embeddings(), dim=-1).T / 0.1
    torch.testing.assert_close(scores[:-1], expected[:-1].detach())
    assert torch.equal(scores[-1], torch.zeros(model.num_items))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        TextRecommender(model.text, 0)
    masked = TextRecommender(model.text, 0.1, without_history=True).score(items, bounds)
    for row, history in enumerate(histories.to_lists()):
        for item in range(model.num_items):
            assert float(masked[row, item]) == (-20.0 if item in history else float(scores[row, item]))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "text",
            {"residual": False, "item_side": "text"},
            r'must be "lm" or "auto" when text.residual is false, got "text"',
        ),
        ("objective", {"candidates": "sampled", "num_negatives": 1, "popularity": True}, r"must be false when"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tiny_settings: dict[str, Any], section: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(LaserConfig, {**tiny_settings, section: values})


def test_the_defaults_follow_from_one_another(tiny_settings: dict[str, Any]) -> None:
    def config(**sections: Any) -> LaserConfig:
        left = {name: value for name, value in tiny_settings.items() if name in ("data", "recommender", "output", "lm")}
        return build_config(LaserConfig, left | sections)

    assert config().text.items_are_texts and config().objective.mask_history and config().objective.popularity
    assert not config(text={"residual": False}).text.items_are_texts
    assert not config(text={"item_side": "lm"}).text.items_are_texts
    sampled = config(objective={"candidates": "sampled", "num_negatives": 1}).objective
    assert not sampled.mask_history and not sampled.popularity
    encoder = build_laser(config(), load_inputs(config()), *load_language_model(config().lm))
    assert encoder.bituning.readout == "mean" and encoder.item_side == "text"
    plain = config(text={"residual": False})
    assert build_laser(plain, load_inputs(plain), *load_language_model(plain.lm)).item_side == "lm"


def test_without_a_residual_there_is_no_text_stage(tiny_settings: dict[str, Any]) -> None:
    training = {"batch_size": 16, "text": {"epochs": 1}, "pretrain": {"epochs": 0}, "phase_a": {"epochs": 1}}
    config = build_config(LaserConfig, {**tiny_settings, "training": training | {"phase_b": {"epochs": 0}}})
    train_laser(config, progress=False)
    assert {epoch.stage for epoch in read_run(Path(config.output)).epochs} == {"phase_a"}
