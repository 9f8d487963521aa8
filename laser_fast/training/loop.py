"""The loop of all stages: one pass over batches with accelerate, its sums, and stopping early."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from laser_fast.config import OptimizerConfig
from laser_fast.data.batches import PackedBatch
from laser_fast.data.micro_batches import VirtualTokens
from laser_fast.models.device_batches import on_device
from laser_fast.models.token_budget import TokenBudget, is_out_of_memory, release_memory
from laser_fast.planning.shortages import Plan, explain_optimizer_shortage
from laser_fast.processes import ALONE, Processes
from laser_fast.runs.resume import State
from laser_fast.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state, warmup_cosine
from laser_fast.training.random_state import RandomState

_SHOW_EVERY = 10  # steps; reading the loss waits for the device

LossFunction = Callable[[PackedBatch], dict[str, Tensor]]
"""Gives at least "loss"; all entries are averaged and logged."""

_Check = tuple[str, Tensor, np.ndarray]  # name and value of what has to be finite, and its rows of the batch

NameRows = Callable[[int, np.ndarray], str]
"""Names rows of the batch of a step (counted within the epoch) for a message."""


@dataclass
class EarlyStopping:
    """Stops after `patience` epochs without a better value (higher is better)."""

    patience: int
    best: float = -math.inf
    best_epoch: int = -1
    waited: int = field(default=0, init=False)

    def improved(self, value: float, epoch: int) -> bool:
        """Record the value of an epoch; True if it is the best so far."""
        if better := value > self.best:
            self.best, self.best_epoch = value, epoch
        self.waited = 0 if better else self.waited + 1
        return better

    @property
    def stop(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience

    def values(self) -> dict[str, float | None]:
        """What was recorded, as JSON; `best` is None before the first value."""
        best = None if self.best == -math.inf else self.best
        return {"best": best, "best_epoch": self.best_epoch, "waited": self.waited}

    def put_back(self, values: dict[str, Any]) -> None:
        """Go on from what `values` gave."""
        self.best = -math.inf if values["best"] is None else values["best"]
        self.best_epoch, self.waited = values["best_epoch"], values["waited"]


@dataclass
class EpochSums:
    """What an epoch has added up so far; a resumed epoch goes on from here."""

    steps: int = 0
    tokens: int = 0  # text tokens
    micro_batches: int = 0
    time_s: float = 0.0
    totals: dict[str, Tensor] = field(default_factory=dict)  # sums of what the loss function reports

    def add(self, values: dict[str, Tensor], tokens: int, micro_batches: int) -> None:
        """Count one step."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, torch.zeros_like(value)) + value
        self.steps += 1
        self.tokens += tokens
        self.micro_batches += micro_batches

    def state(self) -> State:
        """All sums, for `from_state`."""
        counts = {name: value for name, value in vars(self).items() if name != "totals"}
        return State(dict(self.totals), {"counts": counts, "order": list(self.totals)})

    @classmethod
    def from_state(cls, state: State, device: torch.device) -> "EpochSums":
        """The sums that `state` gave, on this device."""
        totals = {name: state.tensors[name].to(device) for name in state.values["order"]}
        return cls(**state.values["counts"], totals=totals)


def _positions(step: int, rows: np.ndarray) -> str:
    return f"rows {rows.tolist()} of the batch"


class StageTrainer:
    """Optimizer, schedule and step of one stage.

    A batch of more packed tokens than the budget allows goes through in micro-batches of whole rows. Each counts by its
    share of the rows, so a mean over rows has the gradient it has without splitting. In-batch candidates and the load
    within the balance loss are those of the micro-batch.

    When memory runs out and the budget may be halved, gradients are dropped, the random generators are put back, and
    the batch goes through again: the step is the one that the smaller budget would have given from the start. The
    optimizer's own step is never repeated.

    Each of several processes takes a share of the rows, in micro-batches that go through together; the step is that of
    the whole batch (`processes`).

    Args:
        modules: what is trained (parameters with `requires_grad`), in train mode during an epoch.
        num_steps: planned steps, over which the learning rate goes up linearly and down with a cosine.
        budget: packed tokens at once; None = no limit.
        virtual_tokens: tokens of a sequence beside its text; None = none.
        plan: what the memory plan expected, for the message when the optimizer finds no memory.
        processes: who trains together; all begin with the parameters of the first.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        modules: nn.Module,
        config: OptimizerConfig,
        num_steps: int,
        *,
        budget: TokenBudget | None = None,
        virtual_tokens: VirtualTokens | None = None,
        plan: Plan | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.accelerator = accelerator
        self.processes = processes
        processes.synchronize(modules)
        self.modules = modules
        self.config = config
        self.budget = TokenBudget() if budget is None else budget
        self.virtual_tokens: VirtualTokens = (lambda batch: 0) if virtual_tokens is None else virtual_tokens
        self.plan = plan
        optimizer = build_optimizer(modules, config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(num_steps, config.warmup_fraction))
        self.optimizer, self.scheduler = accelerator.prepare(optimizer, scheduler)
        self.step = 0

    def run_epoch(
        self,
        batches: Iterator[PackedBatch],
        num_batches: int,
        loss_function: LossFunction,
        *,
        title: str,
        progress: bool,
        sums: EpochSums | None = None,
        after_step: Callable[[], None] | None = None,
        name_rows: NameRows = _positions,
    ) -> dict[str, Any]:
        """One pass: means of what the loss function reports, speed, micro-batches per step; on a GPU the peak memory.

        Args:
            batches: of the steps that are left, the same in all processes.
            num_batches: steps of the whole epoch.
            sums: where the epoch stands, kept up to date; None = at its start.
        """
        self.modules.train()
        sums = EpochSums() if sums is None else sums
        device = self.accelerator.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = perf_counter()
        with tqdm(
            total=num_batches, initial=sums.steps, desc=title, unit="step", disable=not progress, leave=False
        ) as bar:
            for batch in batches:
                reported, parts = self._train_step(batch, loss_function, partial(name_rows, sums.steps))
                sums.add(reported, batch.input_ids.shape[0], parts)
                bar.update()
                if sums.steps % _SHOW_EVERY == 0:
                    bar.set_postfix(loss=f"{float(sums.totals['loss']) / sums.steps:.4f}")
                sums.time_s += perf_counter() - start
                if after_step is not None:
                    after_step()
                start = perf_counter()
        means = {name: (total / num_batches).tolist() for name, total in sums.totals.items()}
        values = means | {
            "step": self.step,
            "time_s": round(sums.time_s, 2),
            "text_tokens_per_s": round(sums.tokens / max(sums.time_s, 1e-9), 1),
            "micro_batches": round(sums.micro_batches / max(1, num_batches), 3),
        }
        if device.type == "cuda":
            values["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
            values["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        return values

    def state(self) -> State:
        """Everything but the parameters: moments, learning rates, schedule, scaler of the loss."""
        optimizer = optimizer_state(self.optimizer)
        values = {
            **optimizer.values,
            "step": self.step,
            "schedule": self.scheduler.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }
        return State(optimizer.tensors, values)

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave."""
        load_optimizer_state(self.optimizer, state)
        self.scheduler.load_state_dict(state.values["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.values["scaler"])
        self.step = state.values["step"]

    def _train_step(
        self, batch: PackedBatch, loss_function: LossFunction, name_rows: Callable[[np.ndarray], str]
    ) -> tuple[dict[str, Tensor], int]:
        """One step of the optimizer: means over the rows of the batch, and the number of micro-batches."""
        while (done := self._add_gradients(batch, loss_function)) is None:
            release_memory()  # the budget is smaller now, and the tensors of the attempt are gone
        values, checks = done
        num_parts = len(checks)
        self.processes.sum_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        try:
            norm = self.accelerator.clip_grad_norm_(self.modules.parameters(), self.config.max_grad_norm)
            if self.accelerator.scaler is None:  # which skips such a step and lowers its scale
                checks.append(("gradient", norm, np.arange(len(batch))))
            self._check_finite(checks, name_rows)
            self.optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            message = explain_optimizer_shortage(self.config.eight_bit, reason, self.plan)
            raise torch.OutOfMemoryError(message) from error
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.processes.sum_values(values), num_parts

    def _add_gradients(
        self, batch: PackedBatch, loss_function: LossFunction
    ) -> tuple[dict[str, Tensor], list[_Check]] | None:
        """Add the gradients of this process's share of a batch; its part of the means, and the loss of each part.

        None when memory ran out and everything is as it was before.
        """
        before = RandomState.now(self.accelerator.device) if self.budget.halve else None
        means: dict[str, Tensor] = {}
        losses: list[_Check] = []
        for rows, share in self._parts(batch):
            part = batch.select(rows) if len(rows) < len(batch) else batch
            try:
                with self.processes.standing_in(not share):
                    values = self._backward(part, share, loss_function)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.optimizer.zero_grad()
                self.budget.shrink(part, self.virtual_tokens, error)
                if before is not None:
                    before.put_back()
                return None
            losses.append(("loss", values["loss"], rows))
            for name, value in values.items():
                means[name] = means.get(name, torch.zeros_like(value)) + value * share
        return means, losses

    def _parts(self, batch: PackedBatch) -> list[tuple[np.ndarray, float]]:
        """Rows of the micro-batches of this process and their share of all rows of the batch.

        Every process has as many: one with fewer stands in with a row that counts nothing.
        """
        if self.processes.size == 1:
            return [(rows, len(rows) / len(batch)) for rows in self.budget.split(batch, self.virtual_tokens)]
        splits: list[list[np.ndarray]] = []
        for rank in range(self.processes.size):
            rows = self.processes.share(len(batch), rank)
            parts = [np.arange(len(rows))]
            if len(rows) and self.budget.limit is not None:
                parts = self.budget.split(batch.select(rows), self.virtual_tokens)
            splits.append([rows[part] for part in parts if len(part)])
        own = splits[self.processes.rank]
        missing = max(map(len, splits)) - len(own)
        return [(rows, len(rows) / len(batch)) for rows in own] + [(np.zeros(1, dtype=np.int64), 0.0)] * missing

    def _backward(self, part: PackedBatch, share: float, loss_function: LossFunction) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch, by its share of the rows; its means over rows."""
        with self.accelerator.autocast():
            values = loss_function(on_device(part, self.accelerator.device))
        self.accelerator.backward(values["loss"] * share)
        return {name: value.detach() for name, value in values.items()}

    def _check_finite(self, checks: list[_Check], name_rows: Callable[[np.ndarray], str]) -> None:
        """Read all at once: the one time in a step that the host waits for the device."""
        finite = torch.stack([torch.isfinite(value) for _, value, _ in checks]).tolist()
        if not self.processes.any(not all(finite)):
            return
        blamed = [check for check, good in zip(checks, finite, strict=True) if not good]
        # the loss of one process makes the summed gradient infinite in all of them, so no other is to blame
        if self.processes.any(any(what == "loss" for what, _, _ in blamed)):
            blamed = [check for check in blamed if check[0] == "loss"]
        with self.processes.together():
            if blamed:
                what, value, rows = blamed[0]
                raise FloatingPointError(
                    f"training: the {what} must be finite, got {value.item()} at step {self.step} in "
                    f"{name_rows(rows)}; lower the learning rate, or train in float32 or bf16"
                )
