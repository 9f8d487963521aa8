"""What all stages share: drawing rows, one pass over them with accelerate, stopping early."""

import math
from collections.abc import Callable, Iterator
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

    Args:
        modules: what is trained (parameters with `requires_grad`), held in train mode during an epoch.
        num_steps: planned steps, over which the learning rate goes up linearly and down with a cosine.
    """

    def __init__(self, accelerator: Accelerator, modules: nn.Module, config: OptimizerConfig, num_steps: int) -> None:
        self.accelerator = accelerator
        self.modules = modules
        self.max_grad_norm = config.max_grad_norm
        optimizer = torch.optim.AdamW(_parameter_groups(modules, config.weight_decay), lr=config.learning_rate)
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
        """One pass: mean of everything the loss function reports, with the tokens per second.

        Raises:
            FloatingPointError: the loss is not finite; names the step.
        """
        self.modules.train()
        totals: dict[str, Tensor] = {}
        tokens, start = 0, perf_counter()
        with tqdm(total=num_batches, desc=title, unit="step", disable=not progress, leave=False) as bar:
            for done, batch in enumerate(batches, start=1):
                values = self._train_step(batch.to(self.accelerator.device), loss_function)
                for name, value in values.items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value
                tokens += batch.input_ids.shape[0]
                bar.update()
                if done % _SHOW_EVERY == 0:
                    bar.set_postfix(loss=f"{float(totals['loss']) / done:.4f}")
        elapsed = perf_counter() - start
        means = {name: (total / num_batches).tolist() for name, total in totals.items()}
        return means | {
            "step": self.step,
            "time_s": round(elapsed, 2),
            "text_tokens_per_s": round(tokens / max(elapsed, 1e-9), 1),
        }

    def _train_step(self, batch: PackedBatch, loss_function: LossFunction) -> dict[str, Tensor]:
        with self.accelerator.autocast():
            values = loss_function(batch)
        loss = values["loss"]
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"training: the loss must be finite, got {loss.item()} at step {self.step}; "
                "lower the learning rate, or train in float32 or bf16"
            )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.modules.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {name: value.detach() for name, value in values.items()}


def warmup_cosine(num_steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear from 0 to 1, then a cosine down to 0."""
    warmup = max(1, round(num_steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup))))

    return factor


def _parameter_groups(modules: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay pulls matrices of linear maps only: not biases, norms or virtual tokens."""
    decayed = {id(module.weight) for module in modules.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
