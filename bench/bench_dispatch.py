"""Dispatch and combine against loops over users and against plain indexing and einsum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from baselines.dispatch_loop import combine_einsum, combine_loop, dispatch_indexing, dispatch_loop
from torch import Tensor

from laser_fast.ops import combine_queries, dispatch_queries

from .conftest import PASSES, one_pass


class Workload(NamedTuple):
    users: int
    top_k: int
    experts: int
    queries: int
    width: int


WORKLOADS = {"cpu": Workload(32, 3, 8, 32, 256), "cuda": Workload(2048, 3, 8, 32, 768)}


def _inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Workload]:
    shape = WORKLOADS[device.type]
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(shape.experts, shape.queries, shape.width, generator=generator)
    expert = torch.rand(shape.users, shape.experts, generator=generator).argsort(dim=1)[:, : shape.top_k].int()
    outputs = torch.randn(shape.users * shape.top_k, shape.queries, shape.width, generator=generator)
    weight = torch.rand(shape.users, shape.top_k, generator=generator)
    return queries.to(device), expert.to(device), outputs.to(device), weight.to(device), shape


@pytest.mark.parametrize("name", PASSES)
def test_dispatch_queries(name: str, device: torch.device, compare: Callable[..., None]) -> None:
    queries, expert, _, _, shape = _inputs(device)
    rows = expert.tolist()
    functions: dict[str, Callable[..., Tensor]] = {
        "candidate": lambda given: dispatch_queries(given, expert),
        "loop": lambda given: dispatch_loop(given, rows),
        "indexing": lambda given: dispatch_indexing(given, expert),
    }
    queries.requires_grad_()
    for function in functions.values():
        assert torch.equal(function(queries), dispatch_queries(queries, expert))
    runs = {key: one_pass(name, function, [queries]) for key, function in functions.items()}
    slab_bytes = queries[0].numel() * queries.element_size()
    moved = slab_bytes * (expert.numel() + shape.experts) * (2 if name == "forward+backward" else 1)
    compare(runs.pop("candidate"), runs, moved_bytes=moved, shape=str(shape))


@pytest.mark.parametrize("name", PASSES)
def test_combine_queries(name: str, device: torch.device, compare: Callable[..., None]) -> None:
    _, _, outputs, weight, shape = _inputs(device)
    functions: dict[str, Callable[..., Tensor]] = {
        "candidate": combine_queries,
        "loop": combine_loop,
        "einsum": combine_einsum,
    }
    inputs = [outputs.requires_grad_(), weight.requires_grad_()]
    for function in functions.values():
        torch.testing.assert_close(function(*inputs), combine_queries(*inputs), rtol=1e-5, atol=1e-5)
    runs = {key: one_pass(name, function, inputs) for key, function in functions.items()}
    slab_bytes = outputs[0].numel() * outputs.element_size()
    slabs = {
        "forward": shape.users * (shape.top_k + 1),
        "backward": shape.users * (2 * shape.top_k + 1),
        "forward+backward": shape.users * (3 * shape.top_k + 2),
    }[name]
    compare(runs.pop("candidate"), runs, moved_bytes=slab_bytes * slabs, shape=str(shape))
