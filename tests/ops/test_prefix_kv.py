"""Prefix injection forward: the compiled copies against the reference, and both against a loop that anyone can read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laser_fast.ops import inject_prefix_kv, inject_prefix_kv_reference

from .prefix_kv_cases import (
    Inputs,
    backend,
    dtype_cases,
    inject_by_hand,
    kind_cases,
    lengths_cases,
    make_inputs,
    prefix_cases,
)

__all__ = ["backend"]


def inject(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inject_prefix_kv(*inputs[:5], prefix_index=inputs.prefix_index)


@lengths_cases
@prefix_cases
@kind_cases
def test_values_equal_a_loop(backend: str, lengths: list[int], prefix_length: int, kind: str) -> None:
    inputs = make_inputs(lengths, prefix_length, kind)
    key, value, cu_seqlens = inject(inputs)
    assert torch.equal(key, inject_by_hand(inputs.key, inputs.prefix_key, inputs))
    assert torch.equal(value, inject_by_hand(inputs.value, inputs.prefix_value, inputs))
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [begin + b * prefix_length for b, begin in enumerate(inputs.cu_seqlens.tolist())]


@dtype_cases
@kind_cases
def test_every_dtype_is_copied_exactly(backend: str, dtype: torch.dtype, kind: str) -> None:
    inputs = make_inputs([3, 0, 5], 2, kind, dtype)
    expected = inject_prefix_kv_reference(*inputs[:5], prefix_index=inputs.prefix_index)
    for actual, exact in zip(inject(inputs), expected, strict=True):
        assert actual.dtype == exact.dtype
        assert torch.equal(actual, exact)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@kind_cases
def test_any_number_of_threads_copies_the_same(num_threads: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs([700, 0, 3, 1500, 1, 250], 40, kind, heads=(4, 256))  # 22 MB: enough for five threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    key, value, _ = inject(inputs)
    assert torch.equal(key, inject_by_hand(inputs.key, inputs.prefix_key, inputs))
    assert torch.equal(value, inject_by_hand(inputs.value, inputs.prefix_value, inputs))


def test_strided_inputs_and_odd_widths(backend: str) -> None:
    inputs = make_inputs([2, 3], 2, "per-sequence", torch.float16)
    views = [tensor.transpose(-1, -2)[..., :1, :] for tensor in inputs.leaves]
    index = torch.tensor([1, 0, 0, 0], dtype=torch.int32)[::2]
    strided = Inputs(*views, inputs.cu_seqlens, index)
    actual = inject(strided)
    assert torch.equal(actual[0], inject_by_hand(views[0], views[2], strided))
    assert torch.equal(actual[1], inject_by_hand(views[1], views[3], strided))
    assert all(tensor.is_contiguous() for tensor in actual)


def test_nan_and_infinity_travel_unchanged(backend: str) -> None:
    inputs = make_inputs([2], 1, "shared")
    inputs.key[0], inputs.value[1], inputs.prefix_key[0] = float("nan"), float("inf"), float("-inf")
    key, value, _ = inject(inputs)
    assert key[1].isnan().all()
    assert value[2].isposinf().all()
    assert key[0].isneginf().all()


@kind_cases
@pytest.mark.parametrize("lengths", [[3, 0, 5], [0], []], ids=["several", "one-empty", "none"])
def test_opcheck(backend: str, lengths: list[int], kind: str) -> None:
    inputs = make_inputs(lengths, 2, kind)
    for needs_grad in (False, True):
        leaves = [tensor.detach().clone().requires_grad_(needs_grad) for tensor in inputs.leaves]
        arguments = (*leaves, inputs.cu_seqlens, inputs.prefix_index)
        torch.library.opcheck(torch.ops.laser_fast.inject_prefix_kv, arguments)


@kind_cases
def test_compiles_without_a_graph_break(kind: str) -> None:
    inputs = make_inputs([3, 0, 5], 2, kind)
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    torch.compiler.reset()
    compiled = torch.compile(inject_prefix_kv, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs[:5], prefix_index=inputs.prefix_index), inject(inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    ours = torch.autograd.grad(actual[0].square().sum() + actual[1].sum(), leaves)
    theirs = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 3, 5], r"cu_seqlens must start at 0, got 1"),
        ([0, 4, 3, 5], r"cu_seqlens must not decrease, got 4"),
        ([0, 6], r"cu_seqlens must end at .* 5, got 6"),
        ([0, 4], r"cu_seqlens must end at .* 5, got 4"),
        ([0], r"cu_seqlens must end at .* 5, got 0"),
    ],
    ids=["start", "decrease", "too-far", "too-short", "no-sequence"],
)
def test_bad_offsets_are_refused(backend: str, offsets: list[int], message: str) -> None:
    inputs = make_inputs([5], 2, "shared")
    with pytest.raises(ValueError, match="inject_prefix_kv: " + message):
        inject_prefix_kv(*inputs[:4], torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("slot", [-1, 5, 2**31 - 1, -(2**31)])
def test_slots_outside_the_pool_are_refused(backend: str, slot: int) -> None:
    inputs = make_inputs([3, 2], 2, "pool")
    index = torch.tensor([4, slot], dtype=torch.int32)
    message = f"inject_prefix_kv: prefix_index must be between 0 and 4, got {slot} at position 1"
    with pytest.raises(ValueError, match=message):
        inject_prefix_kv(*inputs[:5], prefix_index=index)


def test_the_reference_gives_zeros_for_slots_outside_the_pool() -> None:
    inputs = make_inputs([1, 0, 1], 2, "pool")
    index = torch.tensor([-1, 5, 3], dtype=torch.int32)
    key, _, _ = inject_prefix_kv_reference(*inputs[:5], prefix_index=index)  # nothing is read outside
    assert (key[[0, 1, 3, 4]] == 0).all()
    assert torch.equal(key[5:7], inputs.prefix_key[3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": torch.zeros(5, 2, 8, dtype=torch.int32)}, TypeError, "key must be float16, .*, got torch.int32"),
        ({"value": torch.zeros(5, 2, 8, dtype=torch.float16)}, TypeError, "value must be torch.float32, got"),
        ({"prefix_value": torch.zeros(1, 2, 2, 8).double()}, TypeError, "prefix_value must be torch.float32, got"),
        ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, "cu_seqlens must be torch.int32, got torch.int64"),
        ({"cu_seqlens": torch.empty(0, dtype=torch.int32)}, ValueError, "cu_seqlens must have shape"),
        ({"key": torch.zeros(5, 16)}, ValueError, r"key must have 3 dimensions, got shape \(5, 16\)"),
        ({"prefix_key": torch.zeros(2, 2, 8)}, ValueError, r"prefix_key must have 4 dimensions"),
        ({"value": torch.zeros(4, 2, 8)}, ValueError, r"key and value must have one shape, got \(5, 2, 8\) and \(4,"),
        ({"prefix_value": torch.zeros(1, 3, 2, 8)}, ValueError, "prefix_key and prefix_value must have one shape"),
        (
            {"prefix_key": torch.zeros(1, 2, 4, 8), "prefix_value": torch.zeros(1, 2, 4, 8)},
            ValueError,
            r"must agree in heads and head width, got \(1, 2, 4, 8\) and \(5, 2, 8\)",
        ),
        (
            {"prefix_key": torch.zeros(3, 2, 2, 8), "prefix_value": torch.zeros(3, 2, 2, 8)},
            ValueError,
            "prefix_key must have 1 or B = 2 prefixes, got 3; a pool needs prefix_index",
        ),
        ({"value": torch.zeros(5, 2, 8, device="meta")}, ValueError, "one device, got .*value on meta"),
        ({"prefix_index": torch.zeros(2)}, TypeError, "prefix_index must be torch.int32, got torch.float32"),
        (
            {"prefix_index": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"prefix_index must have shape \[B\] = \(2,\), got \(3,\)",
        ),
        (
            {"prefix_index": torch.zeros(2, dtype=torch.int32, device="meta")},
            ValueError,
            "one device, got cu_seqlens on cpu, prefix_index on meta",
        ),
        (
            {
                "prefix_key": torch.zeros(0, 2, 2, 8),
                "prefix_value": torch.zeros(0, 2, 2, 8),
                "prefix_index": torch.zeros(2, dtype=torch.int32),
            },
            ValueError,
            "prefix_key must hold at least 1 prefix where prefix_index is given, got 0",
        ),
    ],
)
def test_arguments_are_checked(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = make_inputs([3, 2], 2, "shared")._asdict() | change
    with pytest.raises(error, match=f"inject_prefix_kv: .*{message}"):
        inject_prefix_kv(**arguments)


def test_too_many_rows_for_int32_are_refused() -> None:
    key = torch.empty(2**30, 1, 1, device="meta")
    prefix = torch.empty(1, 2**30, 1, 1, device="meta")
    cu_seqlens = torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"T \+ B P must fit in int32, got 2147483648"):
        inject_prefix_kv(key, key, prefix, prefix, cu_seqlens)
