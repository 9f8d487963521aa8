"""The limit on packed tokens that go through the language model at once, and what happens when memory runs out."""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from laser_fast.data.batches import PackedBatch
from laser_fast.data.micro_batches import VirtualTokens, row_tokens
from laser_fast.nn.own_lock import OwnLock

# plain RuntimeErrors, unlike that of torch's caching allocator: from the CPU's allocator, the driver (pinned host
# memory, other libraries), cuBLAS and Triton
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


@dataclass(frozen=True)
class Shortage:
    """A batch that did not fit."""

    tokens: int  # packed
    rows: int  # a user and its positive are one
    longest: int  # tokens of the longest row
    reason: str  # first line of the error
    encoding: bool  # without a backward

    @property
    def halved(self) -> int:
        """The next limit: half the tokens, with room for the longest row."""
        return max(self.tokens // 2, self.longest)

    def __str__(self) -> str:
        what = "to encode" if self.encoding else "for a micro-batch of"
        rows = "row" if self.rows == 1 else "rows"
        return f"memory must suffice {what} {self.tokens} packed tokens ({self.rows} {rows}), got {self.reason}"


Explain = Callable[[Shortage], str]
"""The message of an out-of-memory error: what was needed, and which setting to lower."""


class TokenBudget:
    """Splits batches by packed tokens, and may halve the limit when memory runs out. Threads may share it.

    Args:
        limit: packed tokens of one part of a batch, virtual ones included; None = never split. The attribute of this
            name is the present limit.
        halve: halve the limit when memory runs out, instead of stopping.
        explain: writes the message of the error that stops.
        on_halving: called after the limit was lowered.
    """

    def __init__(
        self,
        limit: int | None = None,
        *,
        halve: bool = False,
        explain: Explain = "LaserModel: {}; lower batch_size".format,
        on_halving: Callable[[Shortage], None] | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"TokenBudget: limit must be at least 1, got {limit}")
        self.limit = limit
        self.halve = halve
        self._explain = explain
        self._on_halving = on_halving
        self._warned = False
        self._lock = OwnLock()

    def split(self, batch: PackedBatch, virtual_tokens: VirtualTokens) -> list[np.ndarray]:
        """Rows of the parts of `batch`, each within the limit; a longer row goes alone, with one warning."""
        everything, limit = [np.arange(len(batch))], self.limit
        if limit is None or not len(batch):
            return everything
        tokens = row_tokens(batch, virtual_tokens)
        if tokens.total <= limit:
            return everything
        longest = int(tokens.rows.argmax())
        if tokens.rows[longest] > limit:
            with self._lock:
                first, self._warned = not self._warned, True
            if first:
                warnings.warn(
                    f"TokenBudget: a row should have at most micro_batch_tokens = {limit} packed tokens, got "
                    f"{tokens.rows[longest]} in row {longest} of {len(batch)}; such rows go through alone",
                    stacklevel=2,
                )
        return tokens.split(limit)

    def encode(
        self, batch: PackedBatch, virtual_tokens: VirtualTokens, encode: Callable[[PackedBatch], Tensor]
    ) -> Tensor:
        """`encode` of the batch, part by part, in the order of its rows: [B, d]; errors as of `shrink`."""
        while True:
            parts, results = self.split(batch, virtual_tokens), list[Tensor]()
            for rows in parts:
                part = batch if len(parts) == 1 else batch.select(rows)
                try:
                    results.append(encode(part))
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    self.shrink(part, virtual_tokens, error, encoding=True)
                    break
            else:
                if len(parts) == 1:
                    return results[0]
                encoded = torch.cat(results)
                back = torch.from_numpy(np.argsort(np.concatenate(parts))).to(encoded.device)
                return encoded.index_select(0, back)
            release_memory()

    def shrink(
        self, part: PackedBatch, virtual_tokens: VirtualTokens, error: RuntimeError, *, encoding: bool = False
    ) -> None:
        """Lower the limit to half of what did not fit, with a warning; call `release_memory` when the error is gone.

        Raises:
            torch.OutOfMemoryError: halving is off, or the part is a single row.
        """
        tokens = row_tokens(part, virtual_tokens)
        reason = str(error).partition("\n")[0]
        shortage = Shortage(tokens.total, len(part), int(tokens.rows.max(initial=0)), reason, encoding)
        if not self.halve or len(part) < 2:
            raise torch.OutOfMemoryError(self._explain(shortage)) from error
        with self._lock:  # another thread may have lowered it further
            self.limit = limit = min(shortage.halved, self.limit or shortage.halved)
        warnings.warn(
            f"training: {shortage}; micro_batch_tokens is {limit} from here on, the batch is taken again",
            stacklevel=2,
        )
        if self._on_halving is not None:
            self._on_halving(shortage)


def release_memory() -> None:
    """Give back to the device what an abandoned forward held; the error, which holds its frames, must be gone."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
