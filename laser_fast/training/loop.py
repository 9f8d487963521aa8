"""What all stages share: drawing rows, one pass over them with accelerate, stopping early."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
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
from laser_fast.models.token_budget import TokenBudget, is_out_of_memory, release_memory
from laser_fast.training.memory import Plan, explain_optimizer_shortage
from laser_fast.training.optimizer import build_optimizer

_SHOW_EVERY = 10  # steps; reading the loss waits for the device

LossFunction = Callable[[PackedBatch], dict[str, Tensor]]
"""Gives at least "loss"; the other entries are averaged and logged."""


class RowSampler:
    """Draws the rows of each epoch without repeating one before all were drawn; the same seed gives the same rows.

    Args:
        num_rows: rows there are.
        rows_per_epoch: rows an epoch takes; None = all.
        seed: of the shuffles.
    """

    def __init__(self, num_rows: int, rows_per_epoch: int | None, seed: int) -> None:
        self.num_rows = num_rows
        self.rows_per_epoch = num_rows if rows_per_epoch is None else rows_per_epoch
        self.seed = seed

    def epoch(self, index: int) -> np.ndarray:
        """Row numbers of epoch `index`: int64 [rows_per_epoch]."""
        first = index * self.rows_per_epoch
        wanted = np.arange(first, first + self.rows_per_epoch)
        rows = np.empty(self.rows_per_epoch, dtype=np.int64)
        for shuffle in np.unique(wanted // self.num_rows):
            order = np.random.default_rng([self.seed, int(shuffle)]).permutation(self.num_rows)
            here = wanted // self.num_rows == shuffle
            rows[here] = order[wanted[here] % self.num_rows]
        return rows

    def batches(self, epoch: int, batch_size: int) -> Iterator[np.ndarray]:
        """The rows of an epoch, `batch_size` at a time, the last batch may be smaller."""
        rows = self.epoch(epoch)
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]

    def num_batches(self, batch_size: int) -> int:
        """Batches of one epoch."""
        return math.ceil(self.rows_per_epoch / batch_size)


@dataclass
class EarlyStopping:
    """Stops after `patience` epochs without a better value (higher is better)."""

    patience: int
    best: float = -math.inf
    best_epoch: int = -1
    waited: int = field(default=0, init=False)

    def improved(self, value: float, epoch: int) -> bool:
        """Record the value of an epoch; True when it is the best so far."""
        if value > self.best:
            self.best, self.best_epoch, self.waited = value, epoch, 0
            return True
        self.waited += 1
        return False

    @property
    def stop(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience


class StageTrainer:
    """Optimizer, schedule and step of one stage.

    A batch of more packed tokens than the budget allows goes through in micro-batches of whole rows, whose gradients
    add up before the one step of the optimizer. Each counts by its share of the rows, so a mean over rows, as the
    cross-entropy against the item matrix, has the gradient it has without splitting. What relates the rows of a batch
    to each other is that of the micro-batch: a user's in-batch candidates are the positives of its micro-batch, and
    the balance loss looks at the load within it. What is logged are means over rows.

    When memory runs out and the budget may be halved, gradients are dropped, the random generators are put back, and
    the batch goes through again under the smaller budget: the step is the one that budget would have given from the
    start. The optimizer's own step is never repeated.

    Args:
        modules: what is trained (parameters with `requires_grad`), held in train mode during an epoch.
        num_steps: planned steps, over which the learning rate goes up linearly and down with a cosine.
        budget: packed tokens at once; None = no limit.
        virtual_tokens: tokens of a sequence beside its text; None = none.
        plan: says what the memory plan expected, for the message when the optimizer finds no memory.
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
    ) -> None:
        self.accelerator = accelerator
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
    ) -> dict[str, Any]:
        """One pass: mean of everything the loss function reports, text tokens per second, micro-batches per step, and
        on a GPU the largest memory.

        Raises:
            FloatingPointError: the loss is not finite; names the step.
            torch.OutOfMemoryError: memory ran out; names the settings to change.
        """
        self.modules.train()
        device = self.accelerator.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        totals: dict[str, Tensor] = {}
        tokens, micro_batches, start = 0, 0, perf_counter()
        with tqdm(total=num_batches, desc=title, unit="step", disable=not progress, leave=False) as bar:
            for done, batch in enumerate(batches, start=1):
                values, parts = self._train_step(batch, loss_function)
                for name, value in values.items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value
                tokens += batch.input_ids.shape[0]
                micro_batches += parts
                bar.update()
                if done % _SHOW_EVERY == 0:
                    bar.set_postfix(loss=f"{float(totals['loss']) / done:.4f}")
        elapsed = perf_counter() - start
        means = {name: (total / num_batches).tolist() for name, total in totals.items()}
        return means | {
            "step": self.step,
            "time_s": round(elapsed, 2),
            "text_tokens_per_s": round(tokens / max(elapsed, 1e-9), 1),
            "micro_batches": round(micro_batches / max(1, num_batches), 3),
            **_peak_memory(device),
        }

    def _train_step(self, batch: PackedBatch, loss_function: LossFunction) -> tuple[dict[str, Tensor], int]:
        """One step of the optimizer; means over the rows of the batch, and the number of micro-batches."""
        while (done := self._add_gradients(batch, loss_function)) is None:
            release_memory()  # the budget is smaller now, and the tensors of the attempt are gone
        try:
            self.accelerator.clip_grad_norm_(self.modules.parameters(), self.config.max_grad_norm)
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
        return done

    def _add_gradients(self, batch: PackedBatch, loss_function: LossFunction) -> tuple[dict[str, Tensor], int] | None:
        """Gradients of one batch, by micro-batches; None when memory ran out and all is as it was before."""
        before = _RandomState.now(self.accelerator.device) if self.budget.halve else None
        totals: dict[str, Tensor] = {}
        parts = self.budget.split(batch, self.virtual_tokens)
        for index, rows in enumerate(parts):
            part = batch.select(rows) if len(parts) > 1 else batch
            last = index == len(parts) - 1
            try:
                with nullcontext() if last else self.accelerator.no_sync(self.modules):
                    values = self._backward(part, len(part) / len(batch), loss_function)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.optimizer.zero_grad()
                self.budget.shrink(part, self.virtual_tokens, error)
                if before is not None:
                    before.put_back()
                return None
            for name, value in values.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value
        return totals, len(parts)

    def _backward(self, part: PackedBatch, share: float, loss_function: LossFunction) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch that has this share of the rows; its part of the means over rows."""
        with self.accelerator.autocast():
            values = loss_function(part.to(self.accelerator.device))
        loss = values["loss"]
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"training: the loss must be finite, got {loss.item()} at step {self.step}; "
                "lower the learning rate, or train in float32 or bf16"
            )
        self.accelerator.backward(loss * share)
        return {name: value.detach() * share for name, value in values.items()}


@dataclass(frozen=True)
class _RandomState:
    """torch's generators of the host and of the device that computes; dropout draws from these."""

    device: torch.device
    host: Tensor
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "_RandomState":
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), on_device)

    def put_back(self) -> None:
        torch.set_rng_state(self.host)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)


def _peak_memory(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def warmup_cosine(num_steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear from 0 to 1, then a cosine down to 0."""
    warmup = max(1, round(num_steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup))))

    return factor
