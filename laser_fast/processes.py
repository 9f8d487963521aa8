"""Several processes train one model, each on its share of a batch's rows.

    L = sum_r w_r L_r        w_r = rows of process r / rows of the batch
    dL = sum_r w_r dL_r      added up once a step, when the gradients of all micro-batches are there

`L_r` may depend on rows of other processes: `Processes.gather` hands them out and carries their gradient back, so the
sum is the gradient that one process has on the whole batch.

Gradients are added by one all-reduce after backward. `DistributedDataParallel` wants one wrapper around every forward
and each parameter in each backward, and divides by the number of processes, while stages train parts of the model and
shares differ in size. Little overlap is lost: few parameters are trained beside a frozen model.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 32 << 20  # gradients in one all-reduce; bounds the memory of the copy


class OtherProcessFailed(RuntimeError):
    """Another process cannot go on, so this one stops too."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"training: all processes must go on together, got an error in process {rank}: {reason}")


class Processes:
    """The processes of torch's default group, and the `rank` of this one; a single process where there is no group.

    All processes call every method but `share` at the same place; a single process gets back what it gave.

    Args:
        device: from which tensors are sent (that of the training: NCCL takes no other).
        alone: a single process, whatever group there is.
    """

    def __init__(self, device: torch.device | str = "cpu", *, alone: bool = False) -> None:
        together = not alone and dist.is_available() and dist.is_initialized()
        self.device = torch.device(device)
        self.rank = dist.get_rank() if together else 0
        self._size = dist.get_world_size() if together else 1
        self._apart = False
        self._stands_in = False

    @property
    def size(self) -> int:
        """Number of processes; 1 within `apart`."""
        return 1 if self._apart else self._size

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within, nothing is communicated: for work that every process repeats by itself."""
        before, self._apart = self._apart, True
        try:
            yield
        finally:
            self._apart = before

    @contextmanager
    def standing_in(self, stands_in: bool) -> Iterator[None]:
        """Within, the rows of this process are no part of the batch, and the others do not see them.

        A share without rows takes a row of another share, so that no kernel meets an empty batch.
        """
        before, self._stands_in = self._stands_in, stands_in
        try:
            yield
        finally:
            self._stands_in = before

    def share(self, count: int, rank: int | None = None) -> np.ndarray:
        """The rows out of `count` that a process takes (None: this one): int64, consecutive, sizes equal up to one."""
        rank = (0 if self._apart else self.rank) if rank is None else rank
        rows: np.ndarray = np.array_split(np.arange(count, dtype=np.int64), self.size)[rank]
        return rows

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, [n, ...] -> [sum n, ...]: those of this process first, then the others by rank.

        n may differ between processes. The gradient of a row goes back to its process, summed over all.
        """
        if self.size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self._counts(0 if self._stands_in else len(rows)), self.rank)
        return gathered

    def gather_parts(self, rows: Tensor) -> list[Tensor]:
        """What each process gave, by rank: one [n, ...] each, without gradient, on the device of `rows`."""
        if self.size == 1:
            return [rows]
        parts = _all_gather(rows.detach().to(self.device), self._counts(len(rows)))
        return [part.to(rows.device) for part in parts]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, with gradient, of one shape everywhere; a process that stands in adds 0."""
        if self.size == 1:
            return values
        total: Tensor = _Sum.apply(values, 0.0 if self._stands_in else 1.0)
        return total

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up `.grad` over the processes, to the same bits in all; a parameter without any keeps none."""
        if self.size == 1:
            return
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        dist.all_reduce(present)
        used = [p for p, count in zip(parameters, present.tolist(), strict=True) if count]
        for bucket in _buckets(used):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            for parameter, total in zip(bucket, flat.split([g.numel() for g in gradients]), strict=True):
                parameter.grad = total.view_as(parameter).clone()

    def sum_values(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every entry summed over the processes, in one message, without gradient."""
        if self.size == 1:
            return values
        flat = torch.cat([value.reshape(-1).to(torch.float64) for value in values.values()])
        dist.all_reduce(flat)
        totals = flat.split([value.numel() for value in values.values()])
        pairs = zip(values.items(), totals, strict=True)
        return {name: total.view_as(value).to(value.dtype) for (name, value), total in pairs}

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in some process."""
        return self.largest(int(flag)) > 0

    def largest(self, value: int) -> int:
        """The largest value of all processes."""
        if self.size == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def of_first(self, value: float) -> float:
        """The value of process 0, bit by bit."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64)
        return float(self.gather_parts(told)[0])

    def synchronize(self, module: nn.Module) -> None:
        """Give the trained parameters the values they have in process 0."""
        if self.size == 1:
            return
        for parameter in module.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.largest(0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes stop if one refuses something within: it raises its own error, the others that of the first."""
        error: Exception | None = None
        try:
            yield
        except (OSError, ValueError, FloatingPointError) as refused:
            error = refused
        text = "" if error is None else str(error) or type(error).__name__
        told = self.gather_parts(torch.tensor(list(text.encode()), dtype=torch.uint8))
        if error is not None:
            raise error
        for rank, reason in enumerate(told):
            if len(reason):
                raise OtherProcessFailed(rank, bytes(reason.tolist()).decode())

    def _counts(self, count: int) -> list[int]:
        mine = torch.tensor([count], device=self.device)
        counts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(counts, mine)
        return [int(value) for value in torch.cat(counts).tolist()]


ALONE = Processes(alone=True)


class _Gather(torch.autograd.Function):
    """See `Processes.gather`; backward adds the gradients of all processes and keeps those of its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank, ctx.own = counts, rank, len(rows)
        others = [part for index, part in enumerate(_all_gather(rows[: counts[rank]], counts)) if index != rank]
        return torch.cat([rows, *others])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        counts, rank, own = ctx.counts, ctx.rank, ctx.own
        sizes = [count for index, count in enumerate(counts) if index != rank]
        parts = list(grad[own:].split(sizes))
        parts.insert(rank, grad[: counts[rank]])
        total = torch.cat(parts)
        dist.all_reduce(total)
        if not counts[rank]:  # stood in: nobody else saw these rows
            return grad[:own], None, None
        return total.split(counts)[rank].clone(), None, None


class _Sum(torch.autograd.Function):
    """See `Processes.sum`; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        total = values * factor
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total)
        return total * ctx.factor, None


def _all_gather(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """The rows of every process, by rank; sent padded, as no backend takes ragged parts."""
    longest = max(counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in order, of one dtype and at most `_BUCKET_BYTES` at a time, but at least one."""
    bucket: list[Tensor] = []
    filled = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if bucket and (filled + size > _BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += size
    if bucket:
        yield bucket


def launched_size() -> int:
    """Number of processes according to the launcher (torchrun, accelerate), before they know each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_first() -> bool:
    """Whether this process prints, according to the launcher."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """Leave torch's group, if there is one, at the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
