"""Host copies of what tensors on a device hold, so that lengths and ids of a batch are read without waiting.

A tensor that was copied to a device remembers the tensor it came from, and offsets computed from offsets are computed
on both sides. Reading a tensor that remembers nothing gives the same, and waits for the device.
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
    """Let `tensor`, which is returned, remember `host` as its copy in host memory until either is written to.

    Writes to a tensor that was made in inference mode, through `.data` or by another library are not seen.
    """
    if tensor is not host:
        setattr(tensor, _NAME, _Remembered(host, _state(tensor, host)))
    return tensor


def on_host(tensor: Tensor) -> Tensor:
    """The values in host memory: the tensor itself (also on the meta device), the copy it remembers, or a new one."""
    known = known_on_host(tensor)
    return tensor.cpu() if known is None else known


def known_on_host(tensor: Tensor) -> Tensor | None:
    """As `on_host` without waiting: None where only the device has the values."""
    if tensor.device.type in ("cpu", "meta"):
        return tensor
    found: _Remembered | None = getattr(tensor, _NAME, None)
    return found.host if found is not None and found.state == _state(tensor, found.host) else None


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that remembers where it came from; the host does not wait for it."""
    # from memory that is not pinned the driver takes the values before it returns
    return remember_on_host(host.to(device, non_blocking=True), host)


def _state(tensor: Tensor, host: Tensor) -> tuple[int, int, int]:
    """Differs after a write to either, and for a copy of the tensor, which takes over its attributes."""
    return id(tensor), _version(tensor), _version(host)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
