"""A stage of the training: its epochs, the states kept on the way, and where a resumed run takes it up.

A state holds everything that the rest of the run depends on: a run that goes on from it is, on a CPU, bit by bit the
run that never stopped. Processes differ in their random generators alone; the first one keeps the state for all.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from laser_fast.config import LaserConfig, OptimizerConfig, StageConfig
from laser_fast.data import TrainingRows
from laser_fast.data.batches import PackedBatch
from laser_fast.data.micro_batches import VirtualTokens
from laser_fast.data.negatives import NegativeSampler
from laser_fast.laser.build import Inputs
from laser_fast.laser.model import LaserModel
from laser_fast.models.objective import StepContext
from laser_fast.models.token_budget import TokenBudget
from laser_fast.planning.shortages import Plan
from laser_fast.processes import ALONE, Processes
from laser_fast.runs.resume import State
from laser_fast.runs.run_directory import RunDirectory
from laser_fast.training.interruption import Interrupted, Interruption
from laser_fast.training.loop import EarlyStopping, EpochSums, LossFunction, StageTrainer
from laser_fast.training.random_state import RandomState
from laser_fast.training.training_rows import RowSampler


@dataclass(kw_only=True)
class Session:
    """What the stages of one training share."""

    config: LaserConfig
    inputs: Inputs
    model: LaserModel
    rows: TrainingRows
    run: RunDirectory
    accelerator: Accelerator
    processes: Processes
    interruption: Interruption
    fingerprint: dict[str, str]
    progress: bool
    plan: Plan
    resumed: State | None = None  # to go on from, until the stage it belongs to has taken it up
    best: float = -1.0  # metric of the checkpoint, which a later phase must beat

    @property
    def step(self) -> StepContext:
        """What its steps know of the processes."""
        together = self.config.objective.balance_scope == "global"
        return StepContext(self.processes, self.processes if together else ALONE)

    def stands_in(self, stage: str) -> bool:
        """Whether the run goes on within this stage."""
        return self.resumed is not None and self.resumed.values["position"]["stage"] == stage


@dataclass(kw_only=True)
class Stage:
    """One stage of the training; fields without a comment are those of `StageTrainer`."""

    session: Session
    name: str
    title: str  # shown in the progress bar
    settings: StageConfig
    optimizer: OptimizerConfig
    seed: int  # decides the order of the rows
    modules: nn.Module
    loss_function: LossFunction
    stopping: EarlyStopping
    conclude: Callable[[int, dict[str, Any]], None]  # judges an epoch by its number and what it logs
    heads: nn.Module | None = None  # what is kept of the stage beside the model
    budget: TokenBudget | None = None
    virtual_tokens: VirtualTokens | None = None
    with_positives: bool = False
    negatives: NegativeSampler | None = None
    judges_first: bool = False  # the model before its first step, as epoch -1
    sampler: RowSampler = field(init=False)
    trainer: StageTrainer = field(init=False)

    def __post_init__(self) -> None:
        session = self.session
        self.batch_size = session.config.training.rows_of_step(self.settings)
        self.sampler = RowSampler(len(session.rows), self.settings.rows_per_epoch, self.seed)
        self.num_batches = self.sampler.num_batches(self.batch_size)
        self.trainer = StageTrainer(
            session.accelerator,
            self.modules,
            self.optimizer,
            self.settings.epochs * self.num_batches,
            budget=self.budget,
            virtual_tokens=self.virtual_tokens,
            plan=session.plan,
            processes=session.processes,
        )

    def train(self) -> None:
        """Run the epochs from where the run stands; `conclude` judges each."""
        session = self.session
        if self.judges_first and not session.stands_in(self.name):
            with session.interruption.at_once():
                self.conclude(-1, {})
            self._keep(0, EpochSums())
        first, sums = self._take_up()
        for epoch in range(first, self.settings.epochs):
            if self.stopping.stop:
                break
            values = self._train_epoch(epoch, sums)
            before = self._state(epoch, sums)
            try:
                with session.interruption.at_once():
                    self.conclude(epoch, values)
            except Interrupted:
                session.run.states.save(before)
                session.processes.wait()  # a launcher ends the others as soon as one has left
                raise
            sums = EpochSums()
            self._keep(epoch + 1, sums)

    def _train_epoch(self, epoch: int, sums: EpochSums) -> dict[str, Any]:
        session, size = self.session, self.batch_size

        def batches() -> Iterator[PackedBatch]:
            for rows in islice(self.sampler.batches(epoch, size), sums.steps, None):
                chosen = session.rows.select(rows)
                negatives = None if self.negatives is None else self.negatives.draw(chosen.users, epoch, rows)
                yield session.model.builder.training_batch(
                    chosen, with_positives=self.with_positives, negatives=negatives
                )

        def name_rows(step: int, rows: np.ndarray) -> str:
            numbers = self.sampler.epoch(epoch)[step * size : (step + 1) * size][rows]
            users = [session.inputs.dataset.user_ids[user] for user in session.rows.users[numbers]]
            named = [f"{user} ({row})" for user, row in zip(users, numbers, strict=True)]
            return "users (training rows) " + ", ".join(named)

        def after_step() -> None:
            every = session.config.training.save_steps
            if sums.steps < self.num_batches and (
                session.interruption.requested or (every and self.trainer.step % every == 0)
            ):
                self._keep(epoch, sums)

        return self.trainer.run_epoch(
            batches(),
            self.num_batches,
            self.loss_function,
            title=f"{self.title}, epoch {epoch + 1}",
            progress=session.progress,
            sums=sums,
            after_step=after_step,
            name_rows=name_rows,
        )

    def _keep(self, epoch: int, sums: EpochSums) -> None:
        """Save the state; if a signal came, stop here."""
        self.session.run.states.save(self._state(epoch, sums))
        self.session.interruption.check()

    def _state(self, epoch: int, sums: EpochSums) -> State:
        """Everything the rest of the run depends on; parameters are not copied."""
        session, model = self.session, self.session.model
        position = {
            "stage": self.name,
            "epoch": epoch,
            "step": self.trainer.step,
            "stopping": self.stopping.values(),
            "budget": model.budget.limit,
            "processes": session.processes.size,
            "log_bytes": len(session.run.read_log()),
            "fingerprint": session.fingerprint,
        }
        random: dict[str, Tensor] = {}  # NAME for the first process, RANK.NAME for the others
        for name, tensor in RandomState.now(session.accelerator.device).tensors.items():
            for rank, part in enumerate(session.processes.gather_parts(tensor)):
                random[f"{rank}.{name}" if rank else name] = part
        return State.join(
            position=State(values=position),
            model=State(dict(model.state_dict())),
            items=State({"matrix": model.item_matrix}),
            heads=State({} if self.heads is None else dict(self.heads.state_dict())),
            trainer=self.trainer.state(),
            sums=sums.state(),
            random=State(random),
        )

    def _take_up(self) -> tuple[int, EpochSums]:
        """Epoch and sums to begin with, those of the state where the run goes on from one."""
        run = self.session
        if (state := run.resumed) is None or not run.stands_in(self.name):
            return 0, EpochSums()
        run.resumed = None
        device, position = run.accelerator.device, state.values["position"]
        run.model.load_state_dict(state.part("model").tensors)
        run.model.keep_items(state.part("items").tensors["matrix"].to(device))
        run.model.budget.limit = position["budget"]
        if self.heads is not None:
            self.heads.load_state_dict(state.part("heads").tensors)
        self.trainer.load_state(state.part("trainer"))
        self.stopping.put_back(position["stopping"])
        self._put_back_random_state(state.part("random").tensors, position["processes"])
        return position["epoch"], EpochSums.from_state(state.part("sums"), device)

    def _put_back_random_state(self, states: dict[str, Tensor], known: int) -> None:
        """Let this process's generators go on, if it is among the `known` processes of the state."""
        size, rank = self.session.processes.size, self.session.processes.rank
        if known != size and rank == 0:
            warnings.warn(
                f"train_laser: a run should be resumed in as many processes as it had, {known}, got {size}; parameters "
                "go on as they were, random numbers (dropout) and rows that go through together differ from here on",
                stacklevel=2,
            )
        if rank < known:
            prefix = f"{rank}." if rank else ""
            own = {name: states[prefix + name] for name in states if "." not in name}
            RandomState(self.session.accelerator.device, own).put_back()
