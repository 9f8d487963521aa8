"""Tensors on their way to the host and back: right in any order of copies and computation, and few on the device."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from laser_fast.lm.execution.host_store import HostStore

from ...queued_device import QueuedDevice

LAYERS = 6


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> QueuedDevice:
    monkeypatch.setattr(HostStore, "_leaves", lambda self, tensor: True)
    return QueuedDevice(monkeypatch, seed=getattr(request, "param", 0))


def step(store: HostStore, factor: float, freed: list[Tensor]) -> Tensor:
    """Sum of the inputs of all layers as backward gets them; what the store lets go is overwritten by the next owner.

    Args:
        freed: memory that the computation may use, in which it has just written.
    """
    hidden, away = torch.ones(4) * factor, []
    source = None
    for _ in range(LAYERS):
        away.append(store.put(hidden))
        if source is not None:
            freed.append(source.fill_(torch.nan))
        source, hidden = hidden, hidden * 2.0
    total = torch.zeros(4)
    while away:
        fetched = store.get(away.pop())
        if source is not None:
            freed.append(source.fill_(torch.nan))
        source = None
        total += fetched
        freed.append(fetched.fill_(torch.nan))
    return total


@pytest.mark.parametrize("device", range(20), indirect=True)
def test_copies_and_computation_wait_for_each_other(device: QueuedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HostStore()
    freed: list[Tensor] = []

    new = torch.empty

    def reused(*shape: Any, device: torch.device | None = None, **options: Any) -> Tensor:
        return freed.pop() if device is not None and freed else new(*shape, **options)

    monkeypatch.setattr(torch, "empty", reused)
    with device.queueing(), device.on(device.new_stream()):
        totals = [step(store, factor, freed) for factor in (1.0, 3.0)]
    device.run()
    for total, factor in zip(totals, (1.0, 3.0), strict=True):
        assert torch.equal(total, torch.full((4,), factor * (2**LAYERS - 1)))


def test_a_step_that_is_given_up_leaves_nothing(device: QueuedDevice) -> None:
    store = HostStore()
    kept: list[weakref.ref[Any]] = []

    def put(tensor: Tensor) -> Any:
        stored = store.put(tensor)
        kept.append(weakref.ref(stored))
        return stored

    hidden = torch.ones(4, requires_grad=True)
    with device.queueing(), saved_tensors_hooks(put, store.get):
        for _ in range(3):
            hidden = hidden.sin()
    device.run()  # what is queued is held as well
    assert len(kept) == 3 and all(reference() is not None for reference in kept)
    del hidden
    assert all(reference() is None for reference in kept)
    with device.queueing():
        stored = store.put(torch.full((4,), 5.0))
        actual = store.get(stored)
    device.run()
    assert torch.equal(actual, torch.full((4,), 5.0))


def test_what_is_away_may_be_read_again(device: QueuedDevice) -> None:
    store = HostStore()
    with device.queueing():
        away = [store.put(torch.full((4,), float(number))) for number in range(3)]
        order = (2, 2, 0, 1, 2)
        actual = [store.get(away[number]) for number in order]
    device.run()
    assert [tensor[0].item() for tensor in actual] == list(order)


@pytest.mark.gpu
def test_the_device_holds_few_however_far_the_host_is_ahead() -> None:
    store, size = HostStore(), 2**24
    hidden = torch.ones(size // 4, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(2 * 10**9)  # about a second, in which the host calls all that follows
    away = []
    for _ in range(16):
        away.append(store.put(hidden))
        hidden = hidden + 1.0
    total = torch.zeros_like(hidden)
    while away:
        total += store.get(away.pop())
    assert torch.cuda.max_memory_allocated() - before <= 5 * size
    assert torch.equal(total, torch.full_like(total, 16 * 17 / 2))
