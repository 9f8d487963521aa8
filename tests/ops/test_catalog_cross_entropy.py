"""Chunked catalogue cross-entropy against torch's cross-entropy over all scores in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.ops import catalog, catalog_cross_entropy, catalog_cross_entropy_reference
from laser_fast.ops.catalog_cross_entropy import REDUCTIONS

RowError = Callable[[Tensor, Tensor], float]

_CHUNK = 64  # elements, so that 8 users x 4 dimensions walk over 8 items at a time

SHAPES = [  # users, items, width
    pytest.param((1, 1, 1), id="ones"),
    pytest.param((8, 7, 4), id="one-short-of-a-chunk"),
    pytest.param((8, 8, 4), id="one-chunk"),
    pytest.param((8, 9, 4), id="one-past-a-chunk"),
    pytest.param((8, 24, 4), id="three-chunks"),
    pytest.param((3, 100, 33), id="chunk-of-one-item"),
    pytest.param((100, 50, 3), id="more-users-than-a-chunk-holds"),
]
Shape = tuple[int, int, int]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog._CHUNK_ELEMENTS, "cpu", _CHUNK)


def _inputs(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    num_users, num_items, width = shape
    generator = torch.Generator().manual_seed(num_items)
    users = torch.randn(num_users, width, generator=generator, dtype=torch.float64).to(dtype)
    items = torch.randn(num_items, width, generator=generator, dtype=torch.float64).to(dtype)
    return users, items, torch.randint(0, num_items, (num_users,), generator=generator)


def _exact(users: Tensor, items: Tensor, target: Tensor, normalize: bool, reduction: str) -> Tensor:
    """Torch's own functions only, in the dtype of the inputs."""
    if normalize:
        users, items = F.normalize(users), F.normalize(items)
    return F.cross_entropy(users @ items.T / 0.05, target, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "product"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [catalog_cross_entropy, catalog_cross_entropy_reference], ids=["op", "reference"])
def test_loss_and_gradients_equal_cross_entropy_over_all_scores(
    function: Callable[..., Tensor], shape: Shape, normalize: bool, reduction: str
) -> None:
    users, items, target = _inputs(shape)
    inputs = (users.requires_grad_(), items.requires_grad_())
    actual = function(users, items, target, temperature=0.05, normalize=normalize, reduction=reduction)
    expected = _exact(users, items, target, normalize, reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    ramp = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    for one, other in zip(
        torch.autograd.grad(actual, inputs, ramp), torch.autograd.grad(expected, inputs, ramp), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "product"])
def test_gradcheck(normalize: bool) -> None:
    users, items, target = _inputs((3, 40, 5))
    assert torch.autograd.gradcheck(
        lambda *given: catalog_cross_entropy(*given, target, temperature=0.5, normalize=normalize, reduction="none"),
        (users.requires_grad_(), items.requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["realistic", "large"])
def test_accuracy_of_narrow_dtypes(dtype: torch.dtype, scale: float, worst_row_error: RowError) -> None:
    users, items, target = _inputs((12, 507, 123), dtype)
    inputs = [(users * scale).requires_grad_(), (items * scale).requires_grad_()]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loss = catalog_cross_entropy(*inputs, target, temperature=0.05, reduction="none")
    eager = _exact(*inputs, target, True, "none")
    exact = _exact(*exact_inputs, target, True, "none")
    assert loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert worst_row_error(loss.unsqueeze(1), exact.detach().unsqueeze(1)) < 4e-6  # operands are exact: float32 sums
    ones = torch.ones_like(loss)
    for actual, plain, expected in zip(
        torch.autograd.grad(loss, inputs, ones),
        torch.autograd.grad(eager, inputs, ones.to(eager.dtype)),
        torch.autograd.grad(exact, exact_inputs, ones.double()),
        strict=True,
    ):
        assert actual.dtype == dtype
        # float16 flushes the items' tiny gradients in plain PyTorch and here alike
        assert worst_row_error(actual, expected) <= 2 * worst_row_error(plain, expected) + eps


def test_zero_rows_have_cosine_zero_and_gradient_zero() -> None:
    users, items, _ = _inputs((4, 30, 6))
    users[1], items[2] = 0, 0
    target = torch.tensor([2, 3, 4, 5])
    users.requires_grad_()
    items.requires_grad_()
    for function in (catalog_cross_entropy, catalog_cross_entropy_reference):
        loss = function(users, items, target, temperature=0.05, reduction="none")
        assert loss[1].item() == pytest.approx(torch.tensor(30.0).log().item(), rel=1e-6)
        grad_users, grad_items = torch.autograd.grad(loss.sum(), (users, items))
        assert grad_users.isfinite().all()
        assert grad_items.isfinite().all()
        assert grad_users[1].eq(0).all()
        assert grad_items[2].eq(0).all()
        assert grad_items.ne(0).any(dim=1).sum() == 29


@pytest.mark.parametrize(("reduction", "shape"), [("mean", ()), ("sum", ()), ("none", (0,))])
def test_no_user_costs_nothing(reduction: str, shape: tuple[int, ...]) -> None:
    users, items, target = _inputs((0, 5, 3))
    users.requires_grad_()
    items.requires_grad_()
    loss = catalog_cross_entropy(users, items, target, temperature=0.05, reduction=reduction)
    assert torch.equal(loss, torch.zeros(shape, dtype=torch.float64))
    loss.sum().backward()
    assert users.grad is not None
    assert users.grad.shape == (0, 3)
    assert items.grad is not None
    assert items.grad.eq(0).all()


def test_never_holds_all_scores(inner_operations: type) -> None:
    users, items, target = _inputs((16, 900, 8), torch.float32)
    with inner_operations() as seen:
        catalog_cross_entropy(users.requires_grad_(), items, target, temperature=0.05).backward()
    # without the items' gradient nothing is larger than the users (or a chunk, here less)
    assert seen.largest == users.numel() == 2 * _CHUNK
    assert "laser_fast::catalog_cross_entropy_backward" in seen.names
    with inner_operations() as seen:
        catalog_cross_entropy_reference(users, items, target, temperature=0.05)
    assert seen.largest == 16 * 900


def test_keeps_only_inputs_and_two_numbers_per_user_for_backward() -> None:
    users, items, target = _inputs((16, 500, 8), torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        catalog_cross_entropy(users.requires_grad_(), items.requires_grad_(), target, temperature=0.05)
    own = [
        tensor for tensor in kept if tensor.data_ptr() not in {users.data_ptr(), items.data_ptr(), target.data_ptr()}
    ]
    assert [tuple(tensor.shape) for tensor in own] == [(16,), (16,)]


def test_nothing_is_read_back_from_the_device(inner_operations: type) -> None:
    users, items, target = _inputs((8, 24, 4))
    with inner_operations() as seen:
        catalog_cross_entropy(users.requires_grad_(), items.requires_grad_(), target, temperature=0.05).backward()
    assert seen.readbacks == []


@pytest.mark.parametrize("needed", [0, 1], ids=["users", "items"])
def test_unneeded_gradients_stay_none(needed: int) -> None:
    users, items, target = _inputs((8, 24, 4))
    (users, items)[needed].requires_grad_()
    catalog_cross_entropy(users, items, target, temperature=0.05).backward()
    assert [tensor.grad is not None for tensor in (users, items)] == [index == needed for index in range(2)]


def test_autocast_changes_nothing() -> None:
    users, items, target = _inputs((8, 24, 4), torch.float32)
    inputs = (users.requires_grad_(), items.requires_grad_())

    def results() -> tuple[Tensor, ...]:
        loss = catalog_cross_entropy(*inputs, target, temperature=0.05)
        return (loss, *torch.autograd.grad(loss, inputs))

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results()
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_strides_do_not_matter_and_inputs_stay_as_they_were() -> None:
    users, items, target = _inputs((8, 24, 4))
    before = [tensor.clone() for tensor in (users, items, target)]
    expected = catalog_cross_entropy(users, items, target, temperature=0.05)
    turned_users, turned_items = users.T.contiguous().T, items.T.contiguous().T
    assert not turned_items.is_contiguous()
    turned = [turned_users.requires_grad_(), turned_items.requires_grad_()]
    actual = catalog_cross_entropy(*turned, target.repeat_interleave(2)[::2], temperature=0.05)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    actual.backward()
    users.requires_grad_()
    catalog_cross_entropy(users, items, target, temperature=0.05).backward()
    torch.testing.assert_close(turned_users.grad, users.grad, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(now, then) for now, then in zip((users, items, target), before, strict=True))


def test_backward_twice_is_bit_equal() -> None:
    users, items, target = _inputs((8, 240, 4), torch.float32)
    inputs = (users.requires_grad_(), items.requires_grad_())
    loss = catalog_cross_entropy(*inputs, target, temperature=0.05)
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_a_learned_temperature_is_a_scale_of_unit_users() -> None:
    users, items, target = _inputs((8, 24, 4))
    temperature = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    scaled = F.normalize(users) / temperature
    loss = catalog_cross_entropy(scaled, F.normalize(items), target, temperature=1.0, normalize=False)
    torch.testing.assert_close(loss, catalog_cross_entropy(users, items, target, temperature=0.05))
    loss.backward()
    assert temperature.grad is not None
    assert temperature.grad.abs() > 1e-3


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "product"])
def test_opcheck(normalize: bool) -> None:
    users, items, target = _inputs((8, 24, 4))
    arguments = (users.requires_grad_(), items.requires_grad_(), target, 0.05, normalize)
    torch.library.opcheck(torch.ops.laser_fast.catalog_cross_entropy.default, arguments)


def test_compiles_without_graph_break() -> None:
    users, items, target = _inputs((8, 24, 4))
    inputs = (users.requires_grad_(), items.requires_grad_())

    def loss(users: Tensor, items: Tensor) -> Tensor:
        return catalog_cross_entropy(users, items, target, temperature=0.05)

    actual, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), loss(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _with(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "users": torch.ones(2, 4),
        "items": torch.ones(5, 4),
        "target": torch.tensor([0, 4]),
        "temperature": 0.05,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_with(users=torch.ones(2, 4).int()), TypeError, "users must be floating point, got torch.int32"),
        (_with(items=torch.ones(5)), ValueError, r"items must have 2 dimensions, got shape \(5,\)"),
        (_with(target=torch.zeros(2, 1).long()), ValueError, r"target must have 1 dimensions, got shape \(2, 1\)"),
        (_with(target=torch.tensor([0, 4]).int()), TypeError, "target must be torch.int64, got torch.int32"),
        (_with(target=torch.tensor([0, 4]).to("meta")), ValueError, "one device, got users on cpu.*target on meta"),
        (_with(target=torch.tensor([0])), ValueError, r"target must have one entry per user \(2\), got 1"),
        (_with(target=torch.tensor([0, 5])), ValueError, "target must be between 0 and 4, got 5 at position 1"),
        (_with(target=torch.tensor([-100, 0])), ValueError, "target must be between 0 and 4, got -100 at position 0"),
        (_with(items=torch.ones(5, 3)), ValueError, r"must have one width, got \(2, 4\) and \(5, 3\)"),
        (_with(items=torch.ones(0, 4)), ValueError, r"items must have at least one row, got \(0, 4\)"),
        (_with(temperature=0.0), ValueError, r"temperature must be positive, got 0\.0"),
        (_with(temperature=float("nan")), ValueError, "temperature must be positive, got nan"),
        (_with(temperature=torch.tensor(1.0)), TypeError, "temperature must be a Python number, got Tensor"),
        (_with(reduction="max"), ValueError, "reduction must be one of mean, sum, none, got 'max'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^catalog_cross_entropy: .*{message}"):
        catalog_cross_entropy(**arguments)


def _ignored(users: Tensor, items: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Half of all pairs of a user and an item, among them every user's target, some of them twice."""
    generator = torch.Generator().manual_seed(7)
    rows, places = (torch.rand(len(users), len(items), generator=generator) < 0.5).nonzero(as_tuple=True)
    everyone = torch.arange(len(users))
    return torch.cat([rows, everyone, rows[:3]]), torch.cat([places, target, places[:3]])


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "product"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ignored_items_take_no_part_and_targets_always_do(shape: Shape, normalize: bool) -> None:
    users, items, target = _inputs(shape)
    ignored = _ignored(users, items, target)
    inputs = (users.requires_grad_(), items.requires_grad_())
    found = catalog_cross_entropy(*inputs, target, temperature=0.05, normalize=normalize, ignored=ignored)
    if normalize:
        users, items = F.normalize(users), F.normalize(items)
    scores = users @ items.T / 0.05
    for row, item in zip(*(part.tolist() for part in ignored), strict=True):
        if item != target[row]:
            scores[row, item] = -torch.inf
    expected = F.cross_entropy(scores, target)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)
    for own, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-9, atol=1e-9)
    reference = catalog_cross_entropy_reference(*inputs, target, temperature=0.05, normalize=normalize, ignored=ignored)
    torch.testing.assert_close(reference, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("rows", "places", "message"),
    [
        ([0, 1], [0], r"ignored must be pairs, got 2 rows and 1 items"),
        ([0, 2], [0, 1], r"ignored rows must be between 0 and 1, got 2"),
        ([0, 1], [-1, 1], r"ignored items must be between 0 and 3, got -1"),
    ],
)
def test_ignored_pairs_must_be_of_these_users_and_items(rows: list[int], places: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        catalog_cross_entropy(
            torch.randn(2, 3),
            torch.randn(4, 3),
            torch.tensor([0, 1]),
            temperature=1.0,
            ignored=(torch.tensor(rows), torch.tensor(places)),
        )
