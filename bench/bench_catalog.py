"""Catalogue cross-entropy and top-k against all scores at once, by broadcast cosine and by one matrix product."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from baselines.catalog_full import cross_entropy_broadcast, cross_entropy_product, topk_product
from torch import Tensor

from laser_fast.ops import ItemLists, catalog_cross_entropy, catalog_topk, cu_seqlens_from_lengths

from .conftest import PASSES, one_pass


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


def _inputs(shape: Workload, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(shape.users, shape.width, generator=generator).to(device)
    items = torch.randn(shape.items, shape.width, generator=generator).to(device)
    return users, items, torch.randint(0, shape.items, (shape.users,), generator=generator).to(device)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("items_train", [False, True], ids=["frozen-items", "trained-items"])
def test_catalog_cross_entropy(
    items_train: bool, baseline: str, name: str, device: torch.device, compare: Callable[..., None]
) -> None:
    shape = WORKLOADS[device.type][baseline]
    users, items, target = _inputs(shape, device)
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
    products = {"forward": 1, "backward": 2 + items_train, "forward+backward": 3 + items_train}[name]
    tables = products if items_train else min(products, 2)
    compare(
        one_pass(name, candidate, inputs),
        {baseline: one_pass(name, other, inputs)},
        moved_bytes=tables * items.numel() * items.element_size(),
        floating_point_operations=products * 2 * shape.users * shape.items * shape.width,
        shape={**shape._asdict(), "dtype": str(users.dtype)},
    )


@pytest.mark.parametrize("num_users", [1, 64])
def test_catalog_topk(num_users: int, device: torch.device, compare: Callable[..., None]) -> None:
    shape = Workload(num_users, 1_000_000 if device.type == "cuda" else 50_000, 256 if device.type == "cuda" else 64)
    users, items, _ = _inputs(shape, device)
    seen = torch.randint(0, shape.items, (num_users, 20), generator=torch.Generator().manual_seed(1)).to(device)
    lists = ItemLists(seen.flatten(), cu_seqlens_from_lengths(torch.full((num_users,), 20)).to(device))
    mask = torch.zeros(num_users, shape.items, dtype=torch.bool, device=device).scatter_(1, seen, True)
    scores, indices = catalog_topk(users, items, 10, exclude=lists)
    expected, expected_indices = topk_product(users, items, 10, mask)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert (indices == expected_indices).float().mean() > 0.99  # scores closer than rounding may swap places
    compare(
        lambda: catalog_topk(users, items, 10, exclude=lists),
        {"product": lambda: topk_product(users, items, 10, mask)},
        moved_bytes=items.numel() * items.element_size(),
        shape={**shape._asdict(), "dtype": str(users.dtype)},
    )
