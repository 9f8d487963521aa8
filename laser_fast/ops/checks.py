"""Checks of the arguments of public operations, before anything is read or written where they say.

Shape, dtype and device are checked at every call, also under compile. What a tensor holds is checked where the numbers
are: the host reads those it has (on the CPU, or `host_copies`) at every call, in microseconds
(`pytest bench/bench_operation.py -k offsets`). All others, and those of a compiled graph, are checked on the device
without waiting: a rule that does not hold ends its work with the message, at the latest where the host waits next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor
from torch._C import _DisableTorchDispatch, _has_storage

from laser_fast.ops.host_copies import known_on_host

INT32_MAX = 2**31 - 1
_NAME = "laser_seen_to_hold"


def check_floating(function: str, **tensors: Tensor) -> None:
    """TypeError for a tensor that does not hold floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{function}: {name} must be floating point, got {tensor.dtype}")


def check_dtype(function: str, dtype: torch.dtype, **tensors: Tensor) -> None:
    """TypeError for a tensor of another dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{function}: {name} must be {dtype}, got {tensor.dtype}")


def check_dimensions(function: str, dimensions: int, **tensors: Tensor) -> None:
    """ValueError for a tensor with more or fewer dimensions."""
    for name, tensor in tensors.items():
        if tensor.dim() != dimensions:
            raise ValueError(f"{function}: {name} must have {dimensions} dimensions, got shape {tuple(tensor.shape)}")


def check_one_device(function: str, **tensors: Tensor) -> None:
    """ValueError where the tensors are on several devices."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{function}: all tensors must be on one device, got {found}")


def check_count(function: str, **numbers: int) -> None:
    """TypeError for what is neither a Python integer nor one that a compiler traces."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | torch.SymInt):
            raise TypeError(f"{function}: {name} must be an integer, got {type(number).__name__}")


def check_positive(function: str, **numbers: float) -> None:
    """TypeError for what is no Python number, ValueError for one that is not positive and finite."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{function}: {name} must be a Python number, got {type(number).__name__}")
        if not number > 0:
            raise ValueError(f"{function}: {name} must be positive, got {number}")
        if number == math.inf:
            raise ValueError(f"{function}: {name} must be finite, got {number}")


def host_numbers(tensor: Tensor) -> np.ndarray | None:
    """What the tensor holds, where the host can read it without waiting and no compiler traces; else None."""
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

    `rule` tells this check from others of the same tensor. `message` is that of the RuntimeError on the CPU; a GPU
    prints it, and its error says "device-side assert".
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
    """Note that a rule holds by the way the tensor was made; the rule noted before is forgotten."""
    if not torch.compiler.is_compiling() and (state := _state(tensor, rule)) is not None:
        setattr(tensor, _NAME, state)


def _state(tensor: Tensor, rule: Hashable) -> tuple[int, int, Hashable] | None:
    """It differs after a write, and for a copy, which takes over attributes; None where writes are not counted."""
    return None if tensor.is_inference() else (id(tensor), tensor._version, rule)


def validate_indices(function: str, name: str, indices: Tensor, size: int) -> None:
    """Check that every index lies in 0 to `size` - 1."""
    numbers = host_numbers(indices)
    if numbers is None:
        message = f"{function}: {name} must lie within its bounds"
        hold_on_device(indices, ("indices", size), lambda: ((indices >= 0) & (indices < size)).all(), message)
    elif numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= size):
        where = np.argwhere((numbers < 0) | (numbers >= size))[0]
        found = f"{numbers[tuple(where)]} at position {', '.join(map(str, where))}"
        raise ValueError(f"{function}: {name} must be between 0 and {size - 1}, got {found}")


def remember_indices(indices: Tensor, size: int) -> None:
    """Note that indices lie in 0 to `size` - 1 by the way they were made, so that no device checks them again."""
    if not indices.is_meta:
        remember_to_hold(indices, ("indices", size))
