"""Checks of what tensors hold, before anything is read or written where it says.

Where the host has the numbers (on the CPU, or `host_copies`) it reads them at every call, in microseconds
(`pytest bench/bench_operation.py -k offsets`). Elsewhere the device checks them and nobody waits: what does not hold
ends its work with the message, at the latest where the host waits next. So do compiled graphs, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor
from torch._C import _DisableTorchDispatch, _has_storage

from laser_fast.ops.host_copies import known_on_host

INT32_MAX = 2**31 - 1
_NAME = "laser_seen_to_hold"


def host_numbers(tensor: Tensor) -> np.ndarray | None:
    """What the tensor holds, where the host can read it without waiting; None while a compiler traces."""
    if torch.compiler.is_compiling():
        return None
    host = known_on_host(tensor)
    if host is None or type(host) is not Tensor or host.is_meta or not _has_storage(host):
        return None
    with _DisableTorchDispatch():  # a mode that counts or times operations has nothing to see here
        try:
            numbers: np.ndarray = host.numpy()
        except RuntimeError:  # a transformation of torch.func wraps it
            return None
    return numbers


def hold_on_device(tensor: Tensor, rule: Hashable, condition: Callable[[], Tensor], message: str) -> None:
    """Let the device check that `condition()`, bool [], holds of the tensor: once, until the tensor is written to.

    Args:
        rule: what is asked, apart from others that are asked of the same tensor.
        message: of the RuntimeError; on a GPU it is printed, and the error says "device-side assert".
    """
    if tensor.is_meta:
        return
    if not torch.compiler.is_compiling():
        state = _state(tensor, rule)
        if state is not None and getattr(tensor, _NAME, None) == state:
            return
    torch._assert_async(condition(), message)
    remember_to_hold(tensor, rule)


def remember_to_hold(tensor: Tensor, rule: Hashable) -> None:
    """A rule that holds by the way the tensor was made; the one before it is forgotten."""
    if not torch.compiler.is_compiling() and (state := _state(tensor, rule)) is not None:
        setattr(tensor, _NAME, state)


def _state(tensor: Tensor, rule: Hashable) -> tuple[int, int, Hashable] | None:
    """Another after a write, and for a copy, which takes over attributes; None where writes are not counted."""
    return None if tensor.is_inference() else (id(tensor), tensor._version, rule)


def validate_indices(function: str, name: str, indices: Tensor, size: int) -> None:
    """Every index lies in 0 to `size` - 1; without waiting (see the head of this file).

    Raises:
        ValueError: One does not, and the host has the numbers.
    """
    numbers = host_numbers(indices)
    if numbers is None:
        message = f"{function}: {name} must lie within its bounds"
        hold_on_device(indices, ("indices", size), lambda: ((indices >= 0) & (indices < size)).all(), message)
    elif numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= size):
        where = np.argwhere((numbers < 0) | (numbers >= size))[0]
        found = f"{numbers[tuple(where)]} at position {', '.join(map(str, where))}"
        raise ValueError(f"{function}: {name} must be between 0 and {size - 1}, got {found}")


def remember_indices(indices: Tensor, size: int) -> None:
    """That indices lie in 0 to `size` - 1 by the way they were made, so that no device checks them again."""
    if not indices.is_meta:
        remember_to_hold(indices, ("indices", size))
