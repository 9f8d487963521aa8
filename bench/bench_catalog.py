"""Catalogue cross-entropy and top-k against all scores at once, by broadcast cosine and by one matrix product."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from baselines.catalog_full import cross_entropy_broadcast, cross_entropy_product, topk_product
from baselines.catalog_libraries import library_losses
from forms import PASSES, Compare, one_pass, relative_error, skip_unless_on
from torch import Tensor

from laser_fast.ops import ItemLists, catalog_cross_entropy, catalog_topk, cu_seqlens_from_lengths


class Workload(NamedTuple):
    users: int
    items: int
    width: int


# the broadcast form holds users x items x width numbers several times over: it gets a workload that it survives
WORKLOADS = {
    "cpu": {"broadcast": Workload(4, 1_682, 384), "product": Workload(32, 10_000, 128)},
    "cuda": {"broadcast": Workload(2, 20_000, 4096), "product": Workload(256, 100_000, 4096)},
}
BASELINES = {"broadcast": cross_entropy_broadcast, "product": cross_entropy_product}
TEMPERATURE = 0.05
# the item table in half precision (on a GPU), as it is trained against and served; the last has over 2^31 elements
HALF_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
HALF = {
    "cpu-8-500-32": Workload(8, 500, 32),
    "cuda-256-100000-4096": Workload(256, 100_000, 4096),
    "cuda-1024-1000000-256": Workload(1024, 1_000_000, 256),
    "cuda-256-1000000-4096": Workload(256, 1_000_000, 4096),
}
HALF_TOPK = {
    "cpu-8-500-32": Workload(8, 500, 32),
    "cuda-1-1000000-256": Workload(1, 1_000_000, 256),
    "cuda-64-1000000-256": Workload(64, 1_000_000, 256),
    "cuda-256-1000000-4096": Workload(256, 1_000_000, 4096),
}


def _inputs(shape: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device}
    users = torch.randn(shape.users, shape.width, **draw).to(dtype)
    items = torch.empty(shape.items, shape.width, dtype=dtype, device=device)
    for rows in items.split(100_000):  # a large table in float32 would take twice the memory beside it
        rows.copy_(torch.randn(rows.shape, **draw))
    return users, items, torch.randint(0, shape.items, (shape.users,), **draw)


def _of(name: str, table: dict[str, Workload], device: torch.device) -> Workload:
    skip_unless_on(name.partition("-")[0], device)
    return table[name]


def _facts(name: str, items_train: bool, shape: Workload, items: Tensor) -> dict[str, object]:
    products = {"forward": 1, "backward": 2 + items_train, "forward+backward": 3 + items_train}[name]
    tables = products if items_train else min(products, 2)
    return {
        "moved_bytes": tables * items.numel() * items.element_size(),
        "floating_point_operations": products * 2 * shape.users * shape.items * shape.width,
        "shape": {**shape._asdict(), "dtype": str(items.dtype)},
    }


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("items_train", [False, True], ids=["frozen-items", "trained-items"])
def test_catalog_cross_entropy(
    items_train: bool, baseline: str, name: str, device: torch.device, compare: Compare
) -> None:
    shape = WORKLOADS[device.type][baseline]
    users, items, target = _inputs(shape, device, torch.float32)
    inputs = [users.requires_grad_()] + ([items.requires_grad_()] if items_train else [])

    def candidate(users: Tensor, items: Tensor = items) -> Tensor:
        return catalog_cross_entropy(users, items, target, temperature=TEMPERATURE)

    def other(users: Tensor, items: Tensor = items) -> Tensor:
        return BASELINES[baseline](users, items, target, TEMPERATURE)

    torch.testing.assert_close(candidate(*inputs), other(*inputs), rtol=1e-5, atol=1e-5)
    for one, two in zip(
        torch.autograd.grad(candidate(*inputs), inputs), torch.autograd.grad(other(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
    compare(
        one_pass(name, candidate, inputs),
        {baseline: one_pass(name, other, inputs)},
        **_facts(name, items_train, shape, items),
    )


@pytest.mark.parametrize("name", ["forward", "forward+backward"])
@pytest.mark.parametrize("size", HALF)
def test_catalog_cross_entropy_half(size: str, name: str, device: torch.device, quick: bool, compare: Compare) -> None:
    """A frozen table in bfloat16 against all scores at once, the table normalised each time or once and for all."""
    shape = _of(size, HALF, device)
    users, items, target = _inputs(shape, device, HALF_DTYPE[device.type])
    inputs, normalised = [users.requires_grad_()], F.normalize(items)

    def scored(table: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda users: F.cross_entropy((F.normalize(users) @ table.T).float() / TEMPERATURE, target)

    def candidate(users: Tensor) -> Tensor:
        return catalog_cross_entropy(users, items, target, temperature=TEMPERATURE)

    others: dict[str, Callable[[Tensor], Tensor]] = {
        "product": lambda users: scored(F.normalize(items))(users),
        "normalised_before": scored(normalised),
    }
    if not quick:
        others |= library_losses(normalised, target, TEMPERATURE)
    loss, (gradient,) = candidate(users), torch.autograd.grad(candidate(users), inputs)
    for key, other in others.items():
        torch.testing.assert_close(other(users).float(), loss.float(), rtol=1e-2, atol=1e-2, msg=key)
        (theirs,) = torch.autograd.grad(other(users), inputs)
        assert relative_error(theirs.flatten(), gradient.flatten()) < 5e-2, key
    baselines = {key: one_pass(name, other, inputs) for key, other in others.items()}
    compare(one_pass(name, candidate, inputs), baselines, **_facts(name, False, shape, items))


def _compare_topk(shape: Workload, users: Tensor, items: Tensor, compare: Compare) -> None:
    device = users.device
    seen = torch.randint(0, shape.items, (shape.users, 20), generator=torch.Generator().manual_seed(1)).to(device)
    lists = ItemLists(seen.flatten(), cu_seqlens_from_lengths(torch.full((shape.users,), 20)).to(device))
    mask = torch.zeros(shape.users, shape.items, dtype=torch.bool, device=device).scatter_(1, seen, True)
    scores, indices = catalog_topk(users, items, 10, exclude=lists)
    expected, expected_indices = topk_product(users, items, 10, mask)
    if items.dtype == torch.float32:
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
        assert (indices == expected_indices).float().mean() > 0.99  # scores closer than rounding may swap places
    else:
        torch.testing.assert_close(scores.float(), expected.float(), rtol=2e-2, atol=1e-2)
    compare(
        lambda: catalog_topk(users, items, 10, exclude=lists),
        {"product": lambda: topk_product(users, items, 10, mask)},
        moved_bytes=items.numel() * items.element_size(),
        shape={**shape._asdict(), "dtype": str(users.dtype)},
    )


@pytest.mark.parametrize("num_users", [1, 64])
def test_catalog_topk(num_users: int, device: torch.device, compare: Compare) -> None:
    shape = Workload(num_users, 1_000_000 if device.type == "cuda" else 50_000, 256 if device.type == "cuda" else 64)
    users, items, _ = _inputs(shape, device, torch.float32)
    _compare_topk(shape, users, items, compare)


@pytest.mark.parametrize("size", HALF_TOPK)
def test_catalog_topk_half(size: str, device: torch.device, compare: Compare) -> None:
    shape = _of(size, HALF_TOPK, device)
    users, items, _ = _inputs(shape, device, HALF_DTYPE[device.type])
    _compare_topk(shape, users, items, compare)
