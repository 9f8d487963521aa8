"""What the host knows of a tensor on a device: used while it is true, read again as soon as it may not be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from laser_fast.ops.host_copies import known_on_host, on_host, remember_on_host, to_device

CPU = torch.device("cpu")


class OnDevice(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def on_device(host: Tensor) -> Tensor:
    return remember_on_host(host.clone().as_subclass(OnDevice), host)


def test_a_copy_remembers_where_it_came_from() -> None:
    host = torch.tensor([0, 2, 5])
    device = on_device(host)
    assert known_on_host(device) is host and on_host(device) is host
    assert known_on_host(device + 0) is None
    assert on_host(device + 1).tolist() == [1, 3, 6]


def test_host_tensors_are_their_own_copies() -> None:
    host = torch.tensor([0, 2, 5])
    assert on_host(host) is host and to_device(host, CPU) is host and remember_on_host(host, host) is host
    assert not vars(host)
    meta = to_device(host, torch.device("meta"))
    assert on_host(meta) is meta


@pytest.mark.parametrize("way", ["itself", "a view", "detached", "under no_grad"])
def test_what_was_written_to_is_read_again(way: str) -> None:
    device = on_device(torch.tensor([0, 2, 5]))
    with torch.set_grad_enabled(way != "under no_grad"):
        target = {"a view": device[1:], "detached": device.detach()}.get(way, device)
        target.add_(1)
    assert known_on_host(device) is None and on_host(device).tolist() == device.tolist() != [0, 2, 5]


def test_a_copy_on_the_host_that_was_written_to_is_used_no_more() -> None:
    host = torch.tensor([0, 2, 5])
    device = on_device(host)
    host[1] = 4  # as a loader does that fills one tensor batch after batch
    assert known_on_host(device) is None and on_host(device).tolist() == [0, 2, 5]
    assert on_host(on_device(host)).tolist() == [0, 4, 5]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["shallow", "deep"])
def test_a_copy_of_the_tensor_does_not_bring_back_what_is_no_longer_true(copied: Callable[[Tensor], Tensor]) -> None:
    host = torch.tensor([0, 2, 5])
    written = remember_on_host(torch.empty_like(host).copy_(host), host).add_(1)
    other = copied(written)  # has the attributes of the first, and counts one write, as that did when it was filled
    other.__class__ = OnDevice
    assert known_on_host(other) is None and on_host(other).tolist() == [1, 3, 6]
