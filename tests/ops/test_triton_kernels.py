"""When a fused kernel serves, when the reference does quietly, and when it says why it must."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from laser_fast.ops import native, triton_kernels
from laser_fast.ops.triton_kernels import MAX_EXPERTS, triton_absence, triton_serves


class OnGpu:
    """As much of a tensor on a CUDA device as is asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32, index: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device("cuda", index)


def _serves(*tensors: OnGpu, operation: str = "some_op", num_experts: int = 8) -> bool:
    return triton_serves(operation, *tensors, num_experts=num_experts)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What was found out about this machine, and what was said already, is no part of these tests."""
    for cached in (triton_absence, native.warn_fallback):
        cached.cache_clear()
    yield
    for cached in (triton_absence, native.warn_fallback):
        cached.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A machine that has Triton and an sm_90; a test changes it before it asks."""
    found: dict[str, object] = {"triton": True, "capability": (9, 0)}
    find_spec = importlib.util.find_spec

    def fake_find_spec(name: str, package: str | None = None) -> object:
        if name.partition(".")[0] != "triton":
            return find_spec(name, package)
        return object() if found["triton"] else None

    monkeypatch.setattr(importlib.util, "find_spec", fake_find_spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found["capability"])
    return found


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_serve(machine: dict[str, object], capability: tuple[int, int], dtype: torch.dtype) -> None:
    machine["capability"] = capability
    assert triton_absence(0) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _serves(OnGpu(dtype), OnGpu(torch.float32))


def test_without_triton_the_reference_says_so_once_per_operation(machine: dict[str, object]) -> None:
    machine["triton"] = False
    assert triton_absence(0) == "triton is not installed"
    message = (
        "^some_op: the torch reference runs in place of the compiled kernel: triton is not installed; "
        "pip install triton; `laser-fast doctor` lists what runs$"
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert [_serves(OnGpu()) for _ in range(3)] == [False] * 3
    assert len(caught) == 1
    with pytest.warns(RuntimeWarning, match="^other_op: "):
        assert not _serves(OnGpu(), operation="other_op")


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "sm_75"), ((7, 0), "sm_70")])
def test_an_old_gpu_is_named(machine: dict[str, object], capability: tuple[int, int], name: str) -> None:
    machine["capability"] = capability
    assert triton_absence(0) == f"the device is {name}, the kernels need sm_80 or newer"
    with pytest.warns(RuntimeWarning, match=f"some_op: .*: the device is {name}, the kernels need sm_80") as caught:
        assert [_serves(OnGpu()) for _ in range(2)] == [False] * 2
    assert len(caught) == 1


def test_every_device_is_looked_up_once(machine: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def capability(index: int) -> tuple[int, int]:
        asked.append(index)
        return (9, 0) if index == 0 else (7, 5)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    with pytest.warns(RuntimeWarning, match="sm_75"):
        assert [_serves(OnGpu(index=index)) for index in (0, 1, 0, 1)] == [True, False, True, False]
    assert asked == [0, 1]


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "no-triton"])
@pytest.mark.parametrize("place", [0, 1])
def test_float64_stays_with_the_reference_quietly(machine: dict[str, object], triton: bool, place: int) -> None:
    machine["triton"] = triton
    tensors = [OnGpu(), OnGpu()]
    tensors[place] = OnGpu(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _serves(*tensors)


def test_too_many_experts_stay_with_the_reference_quietly(machine: dict[str, object]) -> None:
    assert MAX_EXPERTS == 256
    assert _serves(OnGpu(), num_experts=256)
    machine["triton"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _serves(OnGpu(), num_experts=257)


def test_a_cpu_tensor_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from laser_fast.ops import combine_queries, dispatch, dispatch_queries, route_experts, routing

    def refuse(operation: str, *tensors: Tensor, num_experts: int = 1) -> bool:
        raise AssertionError(f"{operation} asked for a kernel on the CPU")

    for module in (routing, dispatch, triton_kernels):
        monkeypatch.setattr(module, "triton_serves", refuse)
    states, router = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    routed = route_experts(states, router, torch.zeros(5), torch.tensor([0, 3], dtype=torch.int32), 2)
    queries = torch.ones(5, 2, 3, requires_grad=True)
    combine_queries(dispatch_queries(queries, routed.expert), routed.weight).sum().backward()
