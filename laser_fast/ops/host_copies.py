"""What a tensor on a device holds, known on the host: lengths and ids travel with a batch, so nobody waits for them.

A tensor that was copied to a device remembers the tensor it came from, and what is computed from packed offsets is
computed on both sides. To read from a tensor that remembers nothing is right as well, and waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NAME = "laser_host_copy"


@dataclass(frozen=True)
class _Remembered:
    host: Tensor
    state: tuple[int, int, int]  # in which `host` was the copy


def remember_on_host(tensor: Tensor, host: Tensor) -> Tensor:
    """`tensor` itself, from now on with `host` as its copy in host memory, until either is written to.

    No write to a tensor that was made in inference mode is seen, nor one through `.data` or another library.
    """
    if tensor is not host:
        setattr(tensor, _NAME, _Remembered(host, _state(tensor, host)))
    return tensor


def on_host(tensor: Tensor) -> Tensor:
    """The same values in host memory: the tensor itself, the copy it remembers, or one that is made now.

    A tensor without values (on the meta device) stays what it is.
    """
    known = known_on_host(tensor)
    return tensor.cpu() if known is None else known


def known_on_host(tensor: Tensor) -> Tensor | None:
    """The same without waiting: None where only the device has the values."""
    if tensor.device.type in ("cpu", "meta"):
        return tensor
    found: _Remembered | None = getattr(tensor, _NAME, None)
    return found.host if found is not None and found.state == _state(tensor, found.host) else None


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that remembers where it came from; the host does not wait for it.

    From memory that is not pinned the driver takes the values before it returns.
    """
    return remember_on_host(host.to(device, non_blocking=True), host)


def _state(tensor: Tensor, host: Tensor) -> tuple[int, int, int]:
    """It differs after a write to either, and for a copy of the tensor, which takes over its attributes."""
    return id(tensor), _version(tensor), _version(host)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
