"""The checks of the compiled library of prefix injection, called directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .prefix_kv_cases import compiled_function, make_inputs

Change = tuple[int, Any, type[Exception], str]


def poisoned(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.full(shape, 7.0) for shape in shapes] + [torch.full((3,), 7, dtype=torch.int32)]


@pytest.mark.parametrize(
    ("offsets", "slots", "message"),
    [
        ([0, 5, 4], [0, 1], "cu_seqlens must not decrease, got 5 before 4"),  # only the last entry is wrong
        ([0, 5, 5], [0, 2], "prefix_index must be between 0 and 1, got 2 at position 1"),
    ],
    ids=["offsets", "slots"],
)
def test_bad_values_are_refused_before_anything_is_written(offsets: list[int], slots: list[int], message: str) -> None:
    inputs = make_inputs([5, 0], 2, "per-sequence")
    bad, index = (torch.tensor(numbers, dtype=torch.int32) for numbers in (offsets, slots))
    outputs = poisoned((9, 2, 8), (9, 2, 8))
    with pytest.raises(ValueError, match=f"inject_prefix_kv: {message}"):
        compiled_function("inject_prefix_kv_cpu")(*inputs.leaves, bad, index, *outputs, 1)
    assert all((tensor == 7).all() for tensor in outputs)
    grads = poisoned((5, 2, 8), (5, 2, 8), (2, 2, 2, 8), (2, 2, 2, 8))[:4]
    given = torch.zeros(9, 2, 8), torch.zeros(9, 2, 8), bad
    with pytest.raises(ValueError, match=f"inject_prefix_kv_backward: {message}"):
        compiled_function("inject_prefix_kv_backward_cpu")(*given, index, 2, 2, *grads, 1)
    assert all((tensor == 7).all() for tensor in grads)


def assert_each_is_refused(name: str, good: list[Any], changes: list[Change]) -> None:
    function = compiled_function(f"{name}_cpu")
    function(*good, 1)
    for position, bad, error, message in changes:
        arguments = [bad if index == position else argument for index, argument in enumerate(good)]
        with pytest.raises(error, match=f"{name}: {message}"):
            function(*arguments, 1)


def test_the_library_checks_the_arguments_of_an_injection() -> None:
    key, value, prefix_key, prefix_value, cu_seqlens, _ = make_inputs([3, 2], 2, "per-sequence")
    outputs = torch.empty(9, 2, 8), torch.empty(9, 2, 8), torch.empty(3, dtype=torch.int32)
    index = torch.zeros(2, dtype=torch.int32)
    good = [key, value, prefix_key, prefix_value, cu_seqlens, None, *outputs]
    with_index = [*good[:5], index, *outputs]
    changes: list[Change] = [
        (0, key.int(), TypeError, "key must be float16, bfloat16, float32 or float64"),
        (0, key[0], ValueError, "key must have 3 dimensions, got 2"),
        (0, key.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "key must be contiguous, got other strides"),
        (1, value.double(), TypeError, "value must have DLPack type"),
        (1, value[:4], ValueError, "value must have size 5 in dimension 0, got 4"),
        (2, prefix_key[0], ValueError, "prefix_key must have 4 dimensions, got 3"),
        (2, prefix_key[:, :, :1].contiguous(), ValueError, "prefix_key must have size 2 in dimension 2, got 1"),
        (3, torch.empty(2, 1, 2, 8), ValueError, "prefix_value must have size 2 in dimension 1, got 1"),
        (4, cu_seqlens.long(), TypeError, "cu_seqlens must have DLPack type"),
        (4, cu_seqlens[None], ValueError, "cu_seqlens must have 1 dimensions, got 2"),
        (4, cu_seqlens[:0], ValueError, "cu_seqlens must have at least 1 entry"),
        (4, torch.zeros(4, dtype=torch.int32), ValueError, "prefix_key must have 1 or 3 prefixes, got 2"),
        (6, torch.empty(8, 2, 8), ValueError, "output_key must have size 9 in dimension 0, got 8"),
        (7, torch.empty(9, 8, 2).transpose(1, 2), ValueError, "output_value must be contiguous, got other strides"),
        (8, outputs[2][:2], ValueError, "output_cu_seqlens must have size 3 in dimension 0, got 2"),
    ]
    assert_each_is_refused("inject_prefix_kv", good, changes)
    of_index: list[Change] = [
        (5, index.long(), TypeError, "prefix_index must have DLPack type"),
        (5, index[:1], ValueError, "prefix_index must have size 2 in dimension 0, got 1"),
    ]
    assert_each_is_refused("inject_prefix_kv", with_index, of_index)


def test_the_library_checks_the_arguments_of_a_gradient() -> None:
    key, value, prefix_key, prefix_value, cu_seqlens, _ = make_inputs([3, 2], 2, "per-sequence")
    grad = torch.zeros(9, 2, 8)
    good = [grad, grad.clone(), cu_seqlens, None, 2, 2, key, value, prefix_key, prefix_value]
    changes: list[Change] = [
        (0, None, ValueError, "grad_key must be given, got none"),
        (0, grad.int(), TypeError, "grad_key must be float16"),
        (0, grad[0], ValueError, "grad_key must have 3 dimensions, got 2"),
        (0, grad[:3], ValueError, "grad_key must have at least B P rows, got 3"),
        (1, grad[:8], ValueError, "grad_value must have size 9 in dimension 0, got 8"),
        (1, None, ValueError, "grad_value must be given, got none"),
        (4, 3, ValueError, "prefix_key must have 1 or 2 prefixes, got 3"),
        (5, 2**30, ValueError, "rows of all prefixes must fit in int32, got 2147483648"),
        (5, 2**62, ValueError, "sequences, prefixes and prefix length must fit in int32, got 4611686018427387904"),
        (5, -1, ValueError, "sequences, prefixes and prefix length must be at least 0, got -1"),
        (6, key[:4], ValueError, "key must have size 5 in dimension 0, got 4"),
        (7, value.double(), TypeError, "value must have DLPack type"),
        (8, prefix_key[:1], ValueError, "prefix_key must have size 2 in dimension 0, got 1"),
        (9, prefix_value[:, :1].contiguous(), ValueError, "prefix_value must have size 2 in dimension 1, got 1"),
    ]
    assert_each_is_refused("inject_prefix_kv_backward", good, changes)
    with pytest.raises(
        ValueError, match="inject_prefix_kv_backward: grad_key or grad_value must be given, got neither"
    ):
        compiled_function("inject_prefix_kv_backward_cpu")(None, None, *good[2:6], None, None, None, None, 1)
