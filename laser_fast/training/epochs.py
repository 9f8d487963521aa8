"""The epochs of a stage: batches, the state kept on the way, and where a resumed run takes it up.

What a state holds is everything that the rest of the run depends on, so a run that goes on from it is, on a CPU, bit
by bit the run that never stopped.

Where several processes train, all hold the same parameters, moments and sums and differ in their random generators
alone; the first one keeps the state, with the generators of all.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from laser_fast.config import LaserConfig, StageConfig
from laser_fast.data import TrainingRows
from laser_fast.data.batches import PackedBatch
from laser_fast.data.negatives import NegativeSampler
from laser_fast.laser.build import Inputs
from laser_fast.laser.model import LaserModel
from laser_fast.models.objective import StepContext
from laser_fast.planning.memory import Plan
from laser_fast.processes import ALONE, Processes
from laser_fast.runs.resume import State, StateFolder
from laser_fast.runs.run_directory import RunDirectory
from laser_fast.training.interruption import Interrupted, Interruption
from laser_fast.training.loop import EarlyStopping, EpochSums, LossFunction, StageTrainer
from laser_fast.training.random_state import RandomState
from laser_fast.training.row_sampler import RowSampler


@dataclass
class Run:
    """What the stages of one run share."""

    config: LaserConfig
    inputs: Inputs
    model: LaserModel
    rows: TrainingRows
    directory: RunDirectory
    accelerator: Accelerator
    progress: bool
    plan: Plan | None
    states: StateFolder
    interruption: Interruption
    fingerprint: dict[str, str]
    processes: Processes
    resumed: State | None = None  # until the stage it belongs to has taken it up

    @property
    def step(self) -> StepContext:
        """What its steps know of the processes."""
        together = self.config.objective.balance_scope == "global"
        return StepContext(self.processes, self.processes if together else ALONE)

    def stands_in(self, stage: str) -> bool:
        """Whether the run goes on in the midst of this stage."""
        return self.resumed is not None and self.resumed.values["position"]["stage"] == stage


@dataclass
class Stage:
    """A stage or phase of the training; `heads` are what it trains beside the model."""

    name: str
    title: str
    settings: StageConfig
    sampler: RowSampler
    trainer: StageTrainer
    stopping: EarlyStopping
    loss_function: LossFunction
    heads: nn.Module | None = None
    with_positives: bool = False
    negatives: NegativeSampler | None = None


def train_epochs(run: Run, stage: Stage, conclude: Callable[[int, dict[str, Any]], None]) -> None:
    """The epochs of a stage from where the run stands, each judged by `conclude`, which trains nothing."""
    first, sums = _take_up(run, stage)
    size, trainer = run.config.training.rows_of_step(stage.settings), stage.trainer
    num_batches = stage.sampler.num_batches(size)
    for epoch in range(first, stage.settings.epochs):
        if stage.stopping.stop:
            break

        def name_rows(step: int, rows: np.ndarray, epoch: int = epoch) -> str:
            return _name_rows(run, stage.sampler.epoch(epoch)[step * size : (step + 1) * size][rows])

        def after_step(epoch: int = epoch, sums: EpochSums = sums) -> None:
            every = run.config.training.save_steps
            if sums.steps < num_batches and (run.interruption.requested or bool(every and trainer.step % every == 0)):
                keep_state(run, stage, epoch, sums)
                run.interruption.check()

        values = trainer.run_epoch(
            _batches(run, stage, epoch, sums.steps),
            num_batches,
            stage.loss_function,
            title=f"{stage.title}, epoch {epoch + 1}",
            progress=run.progress,
            sums=sums,
            after_step=after_step,
            name_rows=name_rows,
        )
        before = _capture(run, stage, epoch, sums)
        try:
            with run.interruption.at_once():
                conclude(epoch, values)
        except Interrupted:
            run.states.save(before)
            run.processes.wait()  # a launcher ends the others as soon as one has left
            raise
        sums = EpochSums()
        keep_state(run, stage, epoch + 1, sums)


def _capture(run: Run, stage: Stage, epoch: int, sums: EpochSums) -> State:
    """Everything the rest of the run depends on, after the step that was just taken; parameters are not copied."""
    model = run.model
    position = {
        "stage": stage.name,
        "epoch": epoch,
        "step": stage.trainer.step,
        "stopping": stage.stopping.values(),
        "budget": model.budget.limit,
        "processes": run.processes.size,
        "log_bytes": len(run.directory.read_log()),
        "fingerprint": run.fingerprint,
    }
    return State.join(
        position=State(values=position),
        model=State(dict(model.state_dict())),
        items=State({"matrix": model.item_matrix}),
        heads=State({} if stage.heads is None else dict(stage.heads.state_dict())),
        trainer=stage.trainer.state(),
        sums=sums.state(),
        random=State(_random_states(run)),
    )


def _random_states(run: Run) -> dict[str, Tensor]:
    """The generators of the first process by their names, those of another one as `RANK.NAME`."""
    states: dict[str, Tensor] = {}
    for name, tensor in RandomState.now(run.accelerator.device).tensors.items():
        for rank, part in enumerate(run.processes.gather_parts(tensor)):
            states[f"{rank}.{name}" if rank else name] = part
    return states


def keep_state(run: Run, stage: Stage, epoch: int, sums: EpochSums) -> None:
    """Save the state; if a signal came, stop here."""
    run.states.save(_capture(run, stage, epoch, sums))
    run.interruption.check()


def _take_up(run: Run, stage: Stage) -> tuple[int, EpochSums]:
    """Where the stage begins: epoch and what it has added up; at its start, or as the state says."""
    state = run.resumed
    if state is None or not run.stands_in(stage.name):
        return 0, EpochSums()
    run.resumed = None
    device, position = run.accelerator.device, state.values["position"]
    run.model.load_state_dict(state.part("model").tensors)
    run.model.keep_items(state.part("items").tensors["matrix"].to(device))
    run.model.budget.limit = position["budget"]
    if stage.heads is not None:
        stage.heads.load_state_dict(state.part("heads").tensors)
    stage.trainer.load_state(state.part("trainer"))
    stage.stopping.put_back(position["stopping"])
    sums = EpochSums.from_state(state.part("sums"), device)
    _put_back_random_state(run, state.part("random").tensors, position["processes"])
    return position["epoch"], sums


def _put_back_random_state(run: Run, states: dict[str, Tensor], known: int) -> None:
    """Let this process's generators go on; with another number of processes than before there is no way to."""
    size, rank = run.processes.size, run.processes.rank
    if known != size and rank == 0:
        warnings.warn(
            f"train_laser: a run should be resumed in as many processes as it had, {known}, got {size}; parameters go "
            "on as they were, random numbers (dropout) and rows that go through together differ from here on",
            stacklevel=2,
        )
    if rank >= known:
        return  # a stream of its own since the start
    prefix = f"{rank}." if rank else ""
    names = [name for name in states if "." not in name]
    RandomState(run.accelerator.device, {name: states[prefix + name] for name in names}).put_back()


def _name_rows(run: Run, rows: np.ndarray) -> str:
    users = [run.inputs.dataset.user_ids[user] for user in run.rows.users[rows]]
    return "users (training rows) " + ", ".join(f"{user} ({row})" for user, row in zip(users, rows, strict=True))


def _batches(run: Run, stage: Stage, epoch: int, first: int) -> Iterator[PackedBatch]:
    """Batches of an epoch from step `first` on."""
    size = run.config.training.rows_of_step(stage.settings)
    for rows in islice(stage.sampler.batches(epoch, size), first, None):
        chosen = run.rows.select(rows)
        negatives = None if stage.negatives is None else stage.negatives.draw(chosen.users, epoch, rows)
        yield run.model.builder.training_batch(chosen, with_positives=stage.with_positives, negatives=negatives)
