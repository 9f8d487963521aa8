"""Training in micro-batches: gradients, logged means, running out of memory, and that nothing else changes."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from laser_fast.config import LaserConfig, build_config
from laser_fast.data import training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.data.micro_batches import row_tokens
from laser_fast.laser import LaserModel
from laser_fast.laser.build import build_laser, load_inputs, load_language_model
from laser_fast.models.token_budget import TokenBudget
from laser_fast.runs.checkpoint import Run
from laser_fast.training.loop import StageTrainer
from laser_fast.training.train import train_laser

STILL = {"mformer": {"dropout": 0.0}, "bituning": {"dropout": 0.0}}  # sections without dropout
SHORT = {"pretrain": {"epochs": 0}, "phase_a": {"epochs": 1}, "phase_b": {"epochs": 0}}
QUICK = {"evaluation": {"calibrate": False}}
BATCH = 12
LIMIT = 80  # tokens; three or four micro-batches


def config_of(settings: dict[str, Any], **sections: dict[str, Any]) -> LaserConfig:
    return build_config(LaserConfig, {**settings, **{n: {**settings.get(n, {}), **s} for n, s in sections.items()}})


class Stage:
    """Stage 2 around a fresh model, step by step."""

    def __init__(
        self, settings: dict[str, Any], *, budget: TokenBudget | None = None, positives: bool = True, **sections: Any
    ) -> None:
        self.config = config_of(settings, **sections)
        inputs = load_inputs(self.config)
        torch.manual_seed(0)
        accelerator = Accelerator()
        self.device = accelerator.device
        self.model: LaserModel = build_laser(self.config, inputs, *load_language_model(self.config.lm)).to(self.device)
        self.model.refresh_items()
        rows = training_rows(inputs.split.train, 4)
        self.batches = [
            self.model.builder.training_batch(
                rows.select(np.arange(step * BATCH, (step + 1) * BATCH)), with_positives=positives
            )
            for step in range(3)
        ]
        self.trainer = StageTrainer(
            accelerator,
            self.model,
            self.config.training.optimizer,
            100,
            budget=budget,
            virtual_tokens=self.model.virtual_tokens,
        )

    def loss(self, batch: PackedBatch) -> dict[str, Tensor]:
        output = self.model(batch)
        assert output.load is not None
        return {"loss": output.loss, "balance": output.balance_loss, "load": output.load}

    def epoch(self, first: int = 0, last: int = 3) -> dict[str, Any]:
        torch.manual_seed(7 + first)  # dropout
        batches = self.batches[first:last]
        return self.trainer.run_epoch(iter(batches), len(batches), self.loss, title="", progress=False)

    def parameters(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def gradients(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Of the first batch, as the optimizer meets them."""
    found: dict[str, Tensor] = {}

    def step() -> None:
        found.update({n: p.grad.clone() for n, p in stage.model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(stage.trainer.optimizer, "step", step)
    stage.epoch(0, 1)
    return found


def run_out(stage: Stage, fails: Callable[[int, int], bool]) -> list[int]:
    """Let the language model find no memory where `fails(call, tokens)` says so; returns the tokens of its calls."""
    calls: list[int] = []

    def hook(module: Any, given: Any, named: dict[str, Any]) -> None:
        calls.append(named["inputs_embeds"].shape[1])
        if fails(len(calls) - 1, calls[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    stage.model.lm.model.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_huge_budget_changes_no_bit(tiny_settings: dict[str, Any]) -> None:
    plain, roomy = Stage(tiny_settings), Stage(tiny_settings, budget=TokenBudget(10**9, halve=True))
    start = plain.parameters()
    values = plain.epoch()
    roomy.epoch()
    assert same(plain.parameters(), roomy.parameters()) and not same(plain.parameters(), start)
    assert values["micro_batches"] == 1.0 and values["step"] == 3


def test_the_gradient_of_the_cross_entropy_is_that_of_the_whole_batch(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"positives": False, "objective": {"balance_weight": 0.0}, **STILL}
    limit = {"max_grad_norm": 1e9}  # no clipping
    training = {**tiny_settings["training"], "optimizer": limit}
    whole = gradients(Stage(tiny_settings, training=training, **options), monkeypatch)
    split = Stage(tiny_settings, budget=TokenBudget(40), training=training, **options)
    calls = run_out(split, lambda call, tokens: False)
    parts = gradients(split, monkeypatch)
    assert len(calls) >= 3 and max(calls) <= 40
    assert whole.keys() == parts.keys()
    scale = max(float(value.abs().max()) for value in whole.values())
    for name, value in whole.items():
        assert float((parts[name] - value).abs().max()) <= 1e-6 * max(1.0, scale), name


def test_what_is_logged_are_means_over_rows(tiny_settings: dict[str, Any]) -> None:
    stage = Stage(tiny_settings, budget=TokenBudget(LIMIT), **STILL)
    batch = stage.batches[0]
    parts = stage.trainer.budget.split(batch, stage.model.virtual_tokens)
    assert len({len(rows) for rows in parts}) > 1  # so that a mean over parts would be another
    outputs = [stage.model.train()(batch.select(rows).to(stage.device)) for rows in parts]
    values = stage.epoch(0, 1)
    for name, attribute in {"loss": "loss", "balance": "balance_loss", "load": "load"}.items():
        shares = [
            getattr(o, attribute).detach().cpu() * len(rows) / BATCH for o, rows in zip(outputs, parts, strict=True)
        ]
        torch.testing.assert_close(torch.tensor(values[name]), torch.stack(shares).sum(0), rtol=1e-5, atol=1e-6)
    assert values["micro_batches"] == len(parts)
    whole = stage.model(batch.to(stage.device))
    assert abs(float(whole.loss.detach()) - values["loss"]) > 1e-3  # fewer in-batch candidates


@pytest.mark.parametrize("second_step", [False, True], ids=["first step", "second step"])
def test_a_halved_step_is_the_step_of_the_smaller_budget(tiny_settings: dict[str, Any], second_step: bool) -> None:
    failing = Stage(tiny_settings, budget=TokenBudget(LIMIT, halve=True))
    expected = Stage(tiny_settings, budget=TokenBudget(LIMIT))
    first = int(second_step)
    for stage in (failing, expected):
        stage.epoch(0, first) if first else None
    parts = failing.trainer.budget.split(failing.batches[first], failing.model.virtual_tokens)
    failed = row_tokens(failing.batches[first].select(parts[1]), failing.model.virtual_tokens)
    run_out(failing, lambda call, tokens: call == 3)  # the positives of the second micro-batch
    with pytest.warns(
        UserWarning, match=rf"{failed.total} packed tokens .* is {failed.total // 2} from here on"
    ) as seen:
        values = failing.epoch(first)
    assert len([w for w in seen if "from here on" in str(w.message)]) == 1
    expected.trainer.budget.limit = failing.trainer.budget.limit = failed.total // 2
    assert values["loss"] == expected.epoch(first)["loss"]
    assert same(failing.parameters(), expected.parameters())
    assert failing.trainer.step == 3


def test_the_budget_is_halved_until_the_step_fits(tiny_settings: dict[str, Any]) -> None:
    stage = Stage(tiny_settings, budget=TokenBudget(halve=True))
    total = row_tokens(stage.batches[0], stage.model.virtual_tokens).total
    calls = run_out(stage, lambda call, tokens: tokens > 40)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        values = stage.epoch()
    halvings = [str(warning.message) for warning in seen if "from here on" in str(warning.message)]
    assert len(halvings) == sum(tokens > 40 for tokens in calls) >= 2
    assert f"is {total // 2} from here on" in halvings[0]
    assert values["micro_batches"] > 2 and stage.trainer.step == 3
    limit = stage.trainer.budget.limit
    assert limit is not None and all(tokens <= 40 for tokens in calls[-6:])


def test_without_halving_no_step_is_half_applied(tiny_settings: dict[str, Any]) -> None:
    stage = Stage(tiny_settings, budget=TokenBudget(LIMIT, explain=lambda shortage: f"training: {shortage}"))
    before = stage.parameters()
    run_out(stage, lambda call, tokens: call == 3)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"for a micro-batch of \d+ packed tokens \(\d rows\), got CUDA out"
    ):
        stage.epoch()
    assert same(stage.parameters(), before) and stage.trainer.step == 0
    assert all(parameter.grad is None for parameter in stage.model.parameters())


def test_other_errors_are_not_caught(tiny_settings: dict[str, Any]) -> None:
    stage = Stage(tiny_settings, budget=TokenBudget(LIMIT, halve=True))

    def fail(module: Any, given: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    stage.model.lm.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="^shapes cannot be multiplied$"):
        stage.epoch()


def test_the_optimizer_without_memory_is_never_repeated(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tiny_settings, budget=TokenBudget(LIMIT, halve=True))
    steps: list[int] = []

    def step() -> None:
        steps.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(stage.trainer.optimizer, "step", step)
    with pytest.raises(
        torch.OutOfMemoryError, match="optimizer's step, got CUDA out of memory.; set optimizer.eight_bit"
    ):
        stage.epoch()
    assert steps == [1]


def limited(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Every model that is built from here on finds no memory for more than `limit` tokens."""
    forward = LaserModel._encode_behind

    def encode(self: LaserModel, batch: PackedBatch, *rest: Any) -> Any:
        if batch.input_ids.shape[0] + len(batch) * self.virtual_tokens(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch, *rest)

    monkeypatch.setattr(LaserModel, "_encode_behind", encode)


def test_a_run_goes_on_with_smaller_micro_batches(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 60)
    config = config_of(tiny_settings, training={**SHORT, "halve_on_oom": True}, **QUICK)
    with pytest.warns(UserWarning, match="from here on, the batch is taken again"):
        train_laser(config, progress=False)
    log = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    halvings = [entry for entry in log if entry["stage"] == "out_of_memory"]
    assert halvings and all(entry["micro_batch_tokens"] == entry["failed_tokens"] // 2 for entry in halvings)
    assert halvings[0]["encoding"]
    phase_a = [entry for entry in log if entry["stage"] == "phase_a" and "loss" in entry]
    assert len(phase_a) == 1 and phase_a[0]["micro_batches"] > 1


def test_a_run_that_stops_names_settings_and_plan(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 60)
    monkeypatch.setattr("laser_fast.training.train.one_line", lambda config, on_gpu: "3 GiB")
    message = (
        r"^training: memory must suffice to encode \d+ packed tokens \(25 rows\), got CUDA out of memory.; "
        r"lower training.micro_batch_tokens to \d+ \(now no limit\) or set training.halve_on_oom to true; "
        "the plan said: 3 GiB$"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message):
        train_laser(config_of(tiny_settings, training=SHORT, **QUICK), progress=False)


def test_a_budget_holds_in_a_run_and_in_the_model_it_leaves(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 60)
    config = config_of(tiny_settings, training={**SHORT, "micro_batch_tokens": 60}, **QUICK)
    train_laser(config, progress=False)
    loaded = Run.load(config.output).model
    assert loaded.budget.limit == 60 and loaded.refresh_items().shape[0] == 25


def test_only_a_gpu_logs_its_largest_memory(tiny_settings: dict[str, Any]) -> None:
    stage = Stage(tiny_settings)
    logged = [value for name, value in stage.epoch().items() if name.startswith("peak_")]
    assert logged == sorted(logged) and bool(logged) == (stage.device.type == "cuda") and 0 not in logged
