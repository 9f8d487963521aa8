"""LaserModel in training loops that are not ours: transformers' Trainer, accelerate, a plain loop; RecBole's calls."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from laser_fast import LaserModel
from laser_fast.data import SequenceDataset, leave_one_out, training_rows
from laser_fast.data.loading import NextItemCollator, NextItemDataset
from laser_fast.data.negatives import NegativeSampler
from laser_fast.laser.recbole import RecBoleLaser
from laser_fast.training.refresh_callback import RefreshItems

STEPS = 20
BATCH = 8
_SIZES = {"width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 3, "num_queries": 2, "max_history": 4}
# no dropout: the loops draw from torch's generator for other things as well, each in its own way
CONFIG: dict[str, Any] = {
    "prompt": {"user_template": "{history}", "separator": ",", "max_items": 4},
    "mformer": {**_SIZES, "dropout": 0.0},
    "bituning": {"dropout": 0.0},
}
Losses = list[float]


@pytest.fixture
def model(tiny_lm: Path, tiny_data: Path, tiny_recommender: Path) -> LaserModel:
    torch.manual_seed(0)
    dataset = SequenceDataset.load(tiny_data)
    made = LaserModel.from_pretrained(tiny_lm, items=dataset.items, recommender=tiny_recommender, config=CONFIG)
    made.refresh_items()
    return made


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> NextItemDataset:
    split = leave_one_out(SequenceDataset.load(tiny_data))
    return NextItemDataset(training_rows(split.train, 4))


def optimizer_of(model: LaserModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)


def plain(model: LaserModel, rows: NextItemDataset, folder: Path) -> Losses:
    loader: Any = DataLoader(rows, batch_size=BATCH, collate_fn=NextItemCollator(model.builder))  # type: ignore[arg-type]
    optimizer, losses = optimizer_of(model), []
    model.train()
    while True:
        model.refresh_items()
        for inputs in loader:
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == STEPS:
                return losses


def accelerated(model: LaserModel, rows: NextItemDataset, folder: Path) -> Losses:
    loader: Any = DataLoader(rows, batch_size=BATCH, collate_fn=NextItemCollator(model.builder))  # type: ignore[arg-type]
    accelerator = Accelerator()
    prepared, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    losses: Losses = []
    prepared.train()
    while True:
        model.refresh_items()
        for inputs in loader:
            loss = prepared(**inputs).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == STEPS:
                return losses


def trained(model: LaserModel, rows: NextItemDataset, folder: Path) -> Losses:
    class Record(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend(logs[name] for name in ("loss",) if name in logs)

    losses: Losses = []
    arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=STEPS,
        use_cpu=True,
        seed=7,
    )
    collator = NextItemCollator(model.builder)
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=collator, callbacks=[RefreshItems(model), Record()]
    )
    trainer.train()
    evaluated = trainer.evaluate(rows)
    assert np.isfinite(evaluated["eval_loss"])
    return losses


def test_three_loops_reach_the_same_loss(model: LaserModel, rows: NextItemDataset, tmp_path: Path) -> None:
    start = {name: value.clone() for name, value in model.state_dict().items()}
    runs: dict[str, Losses] = {}
    states, items, untrained = {}, {}, model.encode_items()
    for loop in (plain, accelerated, trained):
        model.load_state_dict(start)
        torch.manual_seed(7)
        runs[loop.__name__] = loop(model, rows, tmp_path)
        states[loop.__name__] = {name: value.clone() for name, value in model.state_dict().items()}
        items[loop.__name__] = model.encode_items()
    assert len(runs["plain"]) == STEPS and runs["plain"][-1] < runs["plain"][0]
    assert runs["accelerated"] == runs["plain"]
    # the Trainer writes its log with four decimals or more
    assert runs["trained"] == pytest.approx(runs["plain"], abs=1e-4)
    assert all(torch.equal(states["accelerated"][name], value) for name, value in states["plain"].items())
    # the Trainer's AdamW is the fused one: a bias that no softmax sees follows rounding, but nothing else shows
    torch.testing.assert_close(items["trained"], items["plain"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(items["plain"], untrained, atol=0.05)
    # what the Trainer saves is the adapter
    saved = load_file(tmp_path / "trainer" / f"checkpoint-{STEPS}" / "model.safetensors")
    assert saved.keys() == start.keys()
    assert all(torch.equal(value, states["trained"][name]) for name, value in saved.items())


class Evaluated(TrainerCallback):
    """Of every evaluation, whether its item matrix was that of the weights it was of."""

    def __init__(self, model: LaserModel) -> None:
        self.model = model
        self.fresh: list[bool] = []

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.fresh.append(torch.equal(self.model.item_matrix, self.model.encode_items()))


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch"])
def test_after_the_trainer_the_model_answers_with_its_own_items(
    model: LaserModel, rows: NextItemDataset, tmp_path: Path, optimizer: str
) -> None:
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        num_train_epochs=2,
        max_steps=6,
        per_device_train_batch_size=BATCH,
        learning_rate=0.05,
        optim=optimizer,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first ones are the best: not the last weights stay
        use_cpu=True,
        seed=7,
    )
    collator, few = NextItemCollator(model.builder), torch.utils.data.Subset(rows, range(16))
    evaluated = Evaluated(model)
    callbacks = [RefreshItems(model), evaluated]
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=few, data_collator=collator, callbacks=callbacks
    )
    trainer.train()
    assert evaluated.fresh == [True] * 3
    assert trainer.state.best_model_checkpoint != str(tmp_path / "trainer" / "checkpoint-6")
    assert torch.equal(model.item_matrix, model.encode_items())
    histories = [["i3", "i4"], ["i9"], []]
    answers = model.recommend(histories, k=5)
    model.save_pretrained(tmp_path / "saved")
    loaded = LaserModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.item_matrix, model.item_matrix)
    assert [[one.item_id for one in best] for best in loaded.recommend(histories, k=5)] == [
        [one.item_id for one in best] for best in answers
    ]


def test_rows_and_batches_are_those_of_our_own_loop(model: LaserModel, rows: NextItemDataset) -> None:
    chosen = [3, 17, 5]
    negatives = NegativeSampler(rows.rows.train, model.num_items, 2, seed=4)
    ours = model.builder.training_batch(
        rows.rows.select(chosen),
        with_positives=True,
        negatives=negatives.draw(rows.rows.users[chosen], 0, np.array(chosen)),
    )
    theirs = NextItemCollator(model.builder, negatives=negatives)([rows[row] for row in chosen])["batch"]
    for name in ("items", "cu_seqlens", "input_ids", "token_cu_seqlens", "targets", "positive_targets", "negatives"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    bare = NextItemCollator(model.builder, with_positives=False)([rows[row] for row in chosen])["batch"]
    assert bare.positives is None
    with pytest.raises(ValueError, match=r"rows must lie in 0\.\.\d+, got -1"):
        rows[-1]


@pytest.fixture
def recbole(model: LaserModel) -> RecBoleLaser:
    """RecBole's indices run the other way round, from 1."""
    return RecBoleLaser(model, ["[PAD]", *reversed(model.item_ids)])


@pytest.fixture
def interaction(model: LaserModel) -> dict[str, torch.Tensor]:
    """Two users, [i3, i4] before i5 and [i9] before i0, as RecBole pads them."""
    first, second = ([model.num_items - item for item in history] for history in ([3, 4], [9]))
    return {
        "item_id": torch.tensor([model.num_items - item for item in (5, 0)]),
        "item_id_list": torch.tensor([[*first, 0], [*second, 0, 0]]),
        "item_length": torch.tensor([2, 1]),
    }


def test_scores_are_those_of_the_model_in_the_order_of_recbole(
    model: LaserModel, recbole: RecBoleLaser, interaction: dict[str, torch.Tensor]
) -> None:
    scores = recbole.full_sort_predict(interaction)
    expected = model.score(torch.tensor([3, 4, 9]), torch.tensor([0, 2, 3], dtype=torch.int32))
    assert scores.shape == (2, model.num_items + 1)
    assert (scores[:, 0] == -torch.inf).all()
    assert torch.equal(scores[:, 1:].flip(1), expected)
    assert torch.equal(recbole.predict(interaction), torch.stack([expected[0, 5], expected[1, 0]]))


def test_the_loss_is_that_of_the_model(
    model: LaserModel, recbole: RecBoleLaser, interaction: dict[str, torch.Tensor]
) -> None:
    from laser_fast.data import EvaluationRows, PackedSequences

    model.eval()
    rows = EvaluationRows(np.zeros(2, np.int64), PackedSequences.from_lists([[3, 4], [9]]), np.array([5, 0]))
    expected = model(model.builder.training_batch(rows, with_positives=True)).loss
    loss = recbole.calculate_loss(interaction)
    assert loss.item() == expected.item()
    recbole(interaction).backward()
    assert model.bituning.suffix_tokens.grad is not None and bool(model.bituning.suffix_tokens.grad.any())
    kept = recbole.other_parameter()["item_matrix"].clone()
    model.item_matrix = torch.zeros_like(kept)
    recbole.load_other_parameter({"item_matrix": kept})
    recbole.load_other_parameter(None)
    assert torch.equal(model.item_matrix, kept)


def test_recbole_evaluates_and_saves_with_the_items_of_now(
    model: LaserModel, recbole: RecBoleLaser, interaction: dict[str, torch.Tensor]
) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for read in (lambda: recbole.full_sort_predict(interaction), recbole.other_parameter):
        recbole.train()
        recbole.calculate_loss(interaction).backward()
        optimizer.step()
        assert model.items_are_outdated
        read()
        assert torch.equal(model.item_matrix, model.encode_items())


def test_unknown_items_and_padding_are_refused(
    model: LaserModel, recbole: RecBoleLaser, interaction: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match="item_tokens must be items of the catalogue, got 'i99'"):
        RecBoleLaser(model, ["[PAD]", "i99"])
    for wrong in (0, model.num_items + 1):
        bad = {**interaction, "item_id_list": torch.tensor([[wrong, 3, 0], [1, 0, 0]])}
        with pytest.raises(ValueError, match=rf"items must lie in 1\.\.25, got {wrong}"):
            recbole.full_sort_predict(bad)
