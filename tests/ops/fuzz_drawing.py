"""What random calls are made of: floating-point tensors in every layout, offsets and indices, good and bad."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FAR = (-1, -(2**31), 2**31 - 1, 2**30, 10**6)


@dataclass
class Call:
    """One call of an operation.

    Attributes:
        name: what every refusal starts with.
        run: the operation on the leaves.
        exact: the same, on leaves in float64.
        leaves: floating-point arguments.
        fits: whether it is to be answered, else refused.
        ranked: whether leaves have a fixed number of dimensions.
        typed: whether the operation itself checks that dtypes and devices of its leaves agree.
    """

    name: str
    run: Callable[..., Sequence[Tensor]]
    exact: Callable[..., Sequence[Tensor]]
    leaves: list[Tensor]
    fits: bool
    ranked: bool = True
    typed: bool = True


class Draw:
    """Random numbers of one call, from its seed alone."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, largest: int) -> int:
        return self.random.randint(0, largest)

    def rarely(self, share: float = 0.1) -> bool:
        return self.random.random() < share

    def dtype(self) -> torch.dtype:
        return self.random.choice(DTYPES)

    def floats(self, *shape: int, dtype: torch.dtype, nan: bool = False) -> Tensor:
        """Contiguous, transposed, every second number, expanded, or behind other numbers of its memory."""
        kind = self.random.choice(["dense", "dense", "transposed", "stepped", "expanded", "offset"])
        base = shape
        if kind == "transposed":
            base = shape[::-1]
        elif kind == "stepped":
            base = *shape[:-1], 2 * shape[-1]
        elif kind == "expanded":
            base = (1, *shape[1:])
        elif kind == "offset":
            base = (shape[0] + 2, *shape[1:])
        numbers = torch.randn(base, generator=self.generator)
        # none is near 0, so that no row is short and no rounding is divided by little
        numbers = (numbers + numbers.sign() * 0.25).to(dtype)
        if nan and numbers.numel():
            numbers.view(-1)[self.size(numbers.numel() - 1)] = torch.nan
        if kind == "transposed":
            return numbers.permute(*reversed(range(len(shape))))
        if kind == "stepped":
            return numbers[..., ::2]
        if kind == "expanded":
            return numbers.expand(shape)
        return numbers[2:] if kind == "offset" else numbers

    def offsets(self, num_rows: int, *, meta: bool = True) -> tuple[Tensor, bool]:
        """cu_seqlens over so many rows, and whether they are right; some on the meta device, where that is wrong."""
        cuts = sorted(self.size(num_rows) for _ in range(self.size(3)))
        numbers = [0, *cuts, num_rows] if num_rows or self.size(2) else [0]
        if self.rarely(0.3):
            place = self.random.randrange(len(numbers))
            wild = self.random.choice([*_FAR, numbers[place] + 1, numbers[place] - 1])
            change = self.random.choice(["spoil", "spoil", "spoil", "shift", "cut", "swap"])
            if change == "spoil":
                numbers[place] = wild
            elif change == "shift":
                numbers = [number + 1 for number in numbers]
            elif change == "cut":
                numbers = numbers[:place]
            else:
                self.random.shuffle(numbers)
        numbers = [min(max(number, -(2**31)), 2**31 - 1) for number in numbers]
        right = bool(numbers) and numbers[0] == 0 and numbers[-1] == num_rows and numbers == sorted(numbers)
        offsets = torch.tensor(numbers, dtype=torch.int32)
        return self._other_form(offsets, right, meta=meta)

    def indices(self, shape: tuple[int, ...], size: int, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """Numbers from 0 to size - 1, some in another layout, and whether they are right."""
        indices = torch.randint(0, max(size, 1), shape, generator=self.generator, dtype=dtype)
        if indices.numel() and self.rarely(0.2):
            place = self.random.randrange(indices.numel())
            indices.view(-1)[place] = self.random.choice([-1, size, size + 1, *_FAR])
        right = all(0 <= number < size for number in indices.flatten().tolist())
        if len(shape) == 2 and self.rarely(0.3):
            indices = indices.T.contiguous().T
        return self._other_form(indices, right)

    def _other_form(self, integers: Tensor, right: bool, *, meta: bool = True) -> tuple[Tensor, bool]:
        if not self.rarely(0.05):
            return integers, right
        other = torch.int64 if integers.dtype == torch.int32 else torch.int32
        changes: list[Callable[[], Tensor]] = [
            lambda: integers.to(other),
            lambda: integers[None],
            lambda: integers.float(),
            *([lambda: integers.to("meta")] if meta else []),
        ]
        return self.random.choice(changes)(), False

    def option(self, good: Any, *bad: Any) -> tuple[Any, bool]:
        """A good value or, rarely, a bad one."""
        return (self.random.choice(bad), False) if self.rarely(0.05) else (good, True)

    def spoil(self, call: Call) -> None:
        """Rarely one leaf of a good call has another dtype, device or number of dimensions."""
        if not call.leaves or not call.fits or not self.rarely(0.06):
            return
        place = self.random.randrange(len(call.leaves))
        leaf = call.leaves[place]
        changes = [leaf.int(), leaf.to("meta")] if call.typed else []
        if call.ranked:
            changes += [leaf[None], leaf.flatten()[:0].sum()]
        call.leaves[place] = self.random.choice(changes)
        call.fits = False
