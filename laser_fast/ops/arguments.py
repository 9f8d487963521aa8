"""Argument checks of the public operations: from shape, dtype and device only, so they also run under compile."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_floating(function: str, **tensors: Tensor) -> None:
    """Every tensor holds floating-point numbers.

    Raises:
        TypeError: A tensor has another dtype.
    """
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{function}: {name} must be floating point, got {tensor.dtype}")


def check_dtype(function: str, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Every tensor has the given dtype.

    Raises:
        TypeError: A tensor has another dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{function}: {name} must be {dtype}, got {tensor.dtype}")


def check_dimensions(function: str, dimensions: int, **tensors: Tensor) -> None:
    """Every tensor has the given number of dimensions.

    Raises:
        ValueError: A tensor has more or fewer.
    """
    for name, tensor in tensors.items():
        if tensor.dim() != dimensions:
            raise ValueError(f"{function}: {name} must have {dimensions} dimensions, got shape {tuple(tensor.shape)}")


def check_one_device(function: str, **tensors: Tensor) -> None:
    """All tensors live on one device.

    Raises:
        ValueError: They do not.
    """
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{function}: all tensors must be on one device, got {found}")


def check_count(function: str, **numbers: int) -> None:
    """Every number is a Python integer, or one that a compiler traces.

    Raises:
        TypeError: It is something else.
    """
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | torch.SymInt):
            raise TypeError(f"{function}: {name} must be an integer, got {type(number).__name__}")


def check_positive(function: str, **numbers: float) -> None:
    """Every number is a positive, finite Python number.

    Raises:
        TypeError: It is a tensor or something else that is no number.
        ValueError: It is zero, negative, infinite or NaN.
    """
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{function}: {name} must be a Python number, got {type(number).__name__}")
        if not number > 0:
            raise ValueError(f"{function}: {name} must be positive, got {number}")
        if number == math.inf:
            raise ValueError(f"{function}: {name} must be finite, got {number}")
