"""Routing: `route_experts` against a loop over users and against packed plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from baselines.routing_loop import routing_loop, routing_packed
from torch import Tensor

from laser_fast.ops import cu_seqlens_from_lengths, route_experts

from .conftest import PASSES, one_pass


class Workload(NamedTuple):
    users: int
    mean_length: int
    width: int
    experts: int
    top_k: int


# the Laser authors' router (768 wide, 8 experts, 3 chosen); the CPU's is that of the demo
WORKLOADS = {
    "cpu": [Workload(64, 20, 256, 8, 3)],
    "cuda": [Workload(256, 20, 768, 8, 3), Workload(8192, 50, 768, 8, 3)],
}


def _objective(result: tuple[Tensor, ...]) -> Tensor:
    _, weight, pooled, balance_loss = result
    return (weight * weight).sum() + (pooled * pooled).sum() + balance_loss


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("index", range(2))
def test_route_experts(index: int, name: str, device: torch.device, compare: Callable[..., None]) -> None:
    if index >= len(WORKLOADS[device.type]):
        pytest.skip(f"{device.type} has {len(WORKLOADS[device.type])} workload")
    shape = WORKLOADS[device.type][index]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2 * shape.mean_length, (shape.users,), generator=generator)
    cu_seqlens = cu_seqlens_from_lengths(lengths).to(device)
    num_items = int(lengths.sum())
    states = torch.randn(num_items, shape.width, generator=generator).to(device)
    weight = (torch.randn(shape.experts, shape.width, generator=generator) / shape.width**0.5).to(device)
    inputs = [tensor.requires_grad_() for tensor in (states, weight, torch.zeros(shape.experts, device=device))]

    def candidate(*given: Any) -> tuple[Tensor, ...]:
        return route_experts(*given, cu_seqlens, shape.top_k)[:4]

    def loop(*given: Any) -> tuple[Tensor, ...]:
        return routing_loop(*given, lengths.tolist(), shape.top_k)

    def packed(*given: Any) -> tuple[Tensor, ...]:
        return routing_packed(*given, cu_seqlens, shape.top_k)

    functions = {
        form.__name__: (lambda *given, form=form: _objective(form(*given))) for form in (candidate, loop, packed)
    }
    expected = candidate(*inputs)
    for form in (loop, packed):
        for actual, exact in zip(form(*inputs), expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5, check_dtype=False)
    runs = {key: one_pass(name, function, inputs) for key, function in functions.items()}
    state_bytes = states.numel() * states.element_size()
    times_moved = {"forward": 1, "backward": 2, "forward+backward": 3}[name]
    compare(runs.pop("candidate"), runs, moved_bytes=times_moved * state_bytes, shape=str(shape))
