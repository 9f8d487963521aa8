"""Chunked top-k against a full stable sort: exact order among equals, constraints, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laser_fast.ops import ItemLists, catalog, catalog_topk, catalog_topk_reference, cu_seqlens_from_lengths


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog._CHUNK_ELEMENTS, "cpu", 64)


def _lists(lists: list[list[int]]) -> ItemLists:
    flat = [item for one in lists for item in one]
    lengths = torch.tensor([len(one) for one in lists], dtype=torch.int64)
    return ItemLists(torch.tensor(flat, dtype=torch.int64), cu_seqlens_from_lengths(lengths))


def _vectors(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _brute_force(scores: list[float], k: int, forbidden: set[int]) -> tuple[list[float], list[int]]:
    ranked = sorted((-score, item) for item, score in enumerate(scores) if item not in forbidden)[:k]
    missing = k - len(ranked)
    return [-score for score, _ in ranked] + [-torch.inf] * missing, [item for _, item in ranked] + [-1] * missing


@st.composite
def _requests(draw: st.DrawFn) -> dict[str, Any]:
    num_users, num_items = draw(st.integers(0, 4)), draw(st.integers(0, 40))
    # few different small integers: exact products, many ties
    coordinate = st.integers(-2, 2)
    return {
        "users": draw(st.lists(st.tuples(coordinate, coordinate), min_size=num_users, max_size=num_users)),
        "items": draw(st.lists(st.tuples(coordinate, coordinate), min_size=num_items, max_size=num_items)),
        "k": draw(st.integers(1, 50)),
        "exclude": draw(
            st.none() | st.lists(st.lists(st.integers(-3, 45), max_size=12), min_size=num_users, max_size=num_users)
        ),
        "allow": draw(st.none() | st.lists(st.booleans(), min_size=num_items, max_size=num_items)),
        "chunk": draw(st.sampled_from([1, 7, 64, 4096])),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_requests())
def test_equals_brute_force_and_never_returns_what_is_excluded(request: dict[str, Any]) -> None:
    users = torch.tensor(request["users"], dtype=torch.float32).view(-1, 2)
    items = torch.tensor(request["items"], dtype=torch.float32).view(-1, 2)
    exclude = _lists(request["exclude"]) if request["exclude"] is not None else None
    allow = torch.tensor(request["allow"], dtype=torch.bool) if request["allow"] is not None else None
    options: dict[str, Any] = {"exclude": exclude, "allow": allow, "normalize": False, "temperature": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(catalog._CHUNK_ELEMENTS, "cpu", request["chunk"])
        scores, indices = catalog_topk(users, items, request["k"], **options)
    reference_scores, reference_indices = catalog_topk_reference(users, items, request["k"], **options)
    assert torch.equal(scores, reference_scores)
    assert torch.equal(indices, reference_indices)
    for b, user in enumerate(request["users"]):
        forbidden = set(request["exclude"][b]) if request["exclude"] is not None else set()
        if request["allow"] is not None:
            forbidden |= {item for item, allowed in enumerate(request["allow"]) if not allowed}
        exact = [2.0 * (user[0] * item[0] + user[1] * item[1]) for item in request["items"]]
        expected_scores, expected_items = _brute_force(exact, request["k"], forbidden)
        assert indices[b].tolist() == expected_items
        assert scores[b].tolist() == expected_scores
        assert not forbidden & (set(indices[b].tolist()) - {-1})


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "product"])
def test_equals_a_full_sort(normalize: bool, dtype: torch.dtype) -> None:
    users, items = _vectors(8, 5, 0, dtype), _vectors(203, 5, 1, dtype)
    scores, indices = catalog_topk(users, items, 20, temperature=0.05, normalize=normalize)
    expected, expected_indices = catalog_topk_reference(users, items, 20, temperature=0.05, normalize=normalize)
    assert scores.dtype == torch.float32
    assert indices.dtype == torch.int64
    # both add up in float32, in another order: 8 eps of the largest score
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)
    assert torch.equal(indices, expected_indices)


@pytest.mark.usefixtures("_small_chunks")
def test_a_constant_scorer_returns_the_first_items_in_order() -> None:
    _, indices = catalog_topk(torch.zeros(3, 4), _vectors(100, 4, 0), 12)
    assert indices.tolist() == [list(range(12))] * 3


@pytest.mark.usefixtures("_small_chunks")
def test_plus_and_minus_zero_tie() -> None:
    # a cosine of -1e-50 underflows to -0
    users, items = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1e-35, 1e15], [1e-35, 1e15], [0.0, 1.0], [-1.0, 0.0]])
    scores, indices = catalog_topk(users, items, 4)
    assert indices.tolist() == [[0, 1, 2, 3]]
    assert scores.tolist() == [[0.0, 0.0, 0.0, -1.0]]


@pytest.mark.usefixtures("_small_chunks")
def test_a_nan_or_minus_infinity_is_no_item_and_infinity_is_first() -> None:
    users = torch.ones(1, 1)
    items = torch.tensor([[1.0], [torch.nan], [-torch.inf], [torch.inf], [2.0]])
    scores, indices = catalog_topk(users, items, 5, normalize=False)
    assert indices.tolist() == [[3, 4, 0, -1, -1]]
    assert scores.tolist() == [[torch.inf, 2.0, 1.0, -torch.inf, -torch.inf]]
    assert catalog_topk(-users / 0 * 0, items, 2)[1].tolist() == [[-1, -1]]


def test_a_million_items_with_ties() -> None:
    generator = torch.Generator().manual_seed(3)
    items = torch.randint(-2, 3, (1_000_000, 2), generator=generator).float()
    users = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    exclude = _lists([(items[:, 0] == 2).nonzero()[:3, 0].tolist(), []])
    scores, indices = catalog_topk(users, items, 100, exclude=exclude, normalize=False)
    expected, expected_indices = catalog_topk_reference(users, items, 100, exclude=exclude, normalize=False)
    assert torch.equal(scores, expected)
    assert torch.equal(indices, expected_indices)
    assert scores.tolist() == [[2.0] * 100, [4.0] * 100]


def test_chunks_stay_small_and_nothing_is_read_back(inner_operations: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog._CHUNK_ELEMENTS, "cpu", 512)
    users, items = _vectors(16, 8, 0), _vectors(5000, 8, 1)
    with inner_operations() as seen:
        catalog_topk(users, items, 10, exclude=_lists([[1, 2]] * 16), allow=torch.ones(5000, dtype=torch.bool))
    assert seen.largest <= items.numel() < 16 * 5000
    assert "aten::scatter_reduce_" in seen.names
    assert seen.readbacks == []


@pytest.mark.usefixtures("_small_chunks")
def test_autocast_strides_and_gradients_change_nothing() -> None:
    users, items = _vectors(8, 5, 0), _vectors(203, 5, 1)
    before = users.clone(), items.clone()
    expected = catalog_topk(users, items, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(catalog_topk(users, items, 20)[0], expected[0])
    strided = torch.stack([items, items], dim=2)[:, :, 0].requires_grad_()
    scores, indices = catalog_topk(users.requires_grad_(), strided, 20)
    assert not scores.requires_grad
    assert torch.equal(indices, expected[1])
    assert all(torch.equal(now, then) for now, then in zip((users, items), before, strict=True))


def test_opcheck_and_compile_without_graph_break() -> None:
    users, items, exclude = _vectors(4, 5, 0), _vectors(23, 5, 1), _lists([[1], [], [3, 4], []])
    allow = torch.arange(23) % 3 > 0
    arguments = (users, items, 6, *exclude, allow, 1.0, True)
    torch.library.opcheck(torch.ops.laser_fast.catalog_topk.default, arguments)
    compiled = torch.compile(catalog_topk, fullgraph=True, backend="aot_eager")
    actual = compiled(users, items, 6, exclude=exclude, allow=allow)
    assert all(
        torch.equal(one, other)
        for one, other in zip(actual, catalog_topk(users, items, 6, exclude=exclude, allow=allow), strict=True)
    )


def _with(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"users": torch.ones(2, 4), "items": torch.ones(5, 4), "k": 3}
    return arguments | changes


_TWO_LISTS = _lists([[1], [2]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_with(users=torch.ones(2, 4).int()), TypeError, "users must be floating point, got torch.int32"),
        (_with(items=torch.ones(5)), ValueError, r"items must have 2 dimensions, got shape \(5,\)"),
        (_with(items=torch.ones(5, 3)), ValueError, r"must have one width, got \(2, 4\) and \(5, 3\)"),
        (_with(items=torch.ones(5, 4, device="meta")), ValueError, "one device, got users on cpu, items on meta"),
        (_with(k=0), ValueError, "k must be at least 1, got 0"),
        (_with(temperature=-1.0), ValueError, r"temperature must be positive, got -1\.0"),
        (_with(temperature=True), TypeError, "temperature must be a Python number, got bool"),
        (_with(allow=torch.ones(5)), TypeError, "allow must be torch.bool, got torch.float32"),
        (_with(allow=torch.ones(4).bool()), ValueError, r"allow must have shape \(5,\), got \(4,\)"),
        (_with(allow=torch.ones(5, device="meta").bool()), ValueError, "one device, got items on cpu, allow on meta"),
        (
            _with(exclude=_TWO_LISTS._replace(items=_TWO_LISTS.items.int())),
            TypeError,
            r"exclude\.items must be torch.int64, got torch.int32",
        ),
        (
            _with(exclude=_TWO_LISTS._replace(items=_TWO_LISTS.items.view(1, 2))),
            ValueError,
            r"exclude\.items must have 1 dimensions, got shape \(1, 2\)",
        ),
        (
            _with(exclude=_TWO_LISTS._replace(cu_seqlens=torch.tensor([0, 1, 2]))),
            TypeError,
            "cu_seqlens must be torch.int32, got torch.int64",
        ),
        (_with(exclude=_lists([[1]])), ValueError, r"exclude must have one list per user \(2\), got 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^catalog_topk: .*{message}"):
        catalog_topk(**arguments)
