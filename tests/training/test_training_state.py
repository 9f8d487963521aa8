"""What a training step leaves behind beside the parameters: moments, schedule, generators."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from laser_fast.config import OptimizerConfig
from laser_fast.runs.resume import State, StateFolder
from laser_fast.runs.run_directory import RunDirectory
from laser_fast.training.loop import StageTrainer
from laser_fast.training.random_state import RandomState


@pytest.mark.parametrize("eight_bit", [False, True], ids=["32 bit", "8 bit"])
def test_moments_and_schedule_go_on(eight_bit: bool, tmp_path: Path) -> None:
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    config = OptimizerConfig(eight_bit=eight_bit, warmup_fraction=0.5)
    trainers = []
    for _ in range(2):
        torch.manual_seed(0)
        trainers.append(StageTrainer(Accelerator(), nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128)), config, 10))

    def step(trainer: StageTrainer, index: int) -> None:
        for parameter in trainer.modules.parameters():
            parameter.grad = torch.full_like(parameter, index + 0.1).cos() * parameter.detach()
        trainer.optimizer.step()
        trainer.scheduler.step()
        trainer.step += 1

    one, other = trainers
    for index in range(3):
        step(one, index)
    position = State(values={"stage": "phase_a", "epoch": 0, "step": 3, "log_bytes": 0})
    folder = StateFolder(tmp_path)
    folder.save(State.join(position=position, trainer=one.state()))
    kept = folder.newest()
    assert kept is not None
    other.modules.load_state_dict({name: value.clone() for name, value in one.modules.state_dict().items()})
    other.load_state(kept.part("trainer"))
    for index in range(3, 6):
        step(one, index)
        step(other, index)
    assert one.step == other.step == 6
    assert one.scheduler.get_last_lr() == other.scheduler.get_last_lr()
    for ours, theirs in zip(one.modules.parameters(), other.modules.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_generators_go_on() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(torch.rand(()))]

    before = RandomState.now(torch.device("cpu"))
    random.gauss(0, 1)  # a second one waits in the generator
    for state in (before, RandomState.now(torch.device("cpu"))):
        state.put_back()
        first = draw()
        state.put_back()
        assert draw() == first and draw() != first


def test_a_damaged_state_is_refused_or_equal(tmp_path: Path, damage_files: Callable[..., int]) -> None:
    directory = RunDirectory(tmp_path / "run", OptimizerConfig()).begin()
    directory.checkpoint.mkdir()
    (directory.checkpoint / "adapter.safetensors").write_bytes(b"the best model")
    directory.log(loss=1.0)
    position = {"stage": "phase_a", "epoch": 0, "step": 3, "log_bytes": len(directory.read_log())}
    state = State({"weight": torch.arange(6.0)}, {"position": position, "best": 0.25})
    directory.states.save(state)

    def newest() -> State | None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return directory.states.newest()

    def same(found: State) -> bool:
        return found.values == state.values and torch.equal(found.tensors["weight"], state.tensors["weight"])

    folder = next((directory.path / "states").iterdir())
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "adapter.safetensors",
        "metrics.jsonl",
        "seal.json",
        "state.json",
        "tensors.safetensors",
        "values.json",
    ]
    assert damage_files(folder, newest, same, 120) > 100
    assert same(directory.states.newest() or State())
