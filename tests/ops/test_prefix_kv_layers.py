"""Injection of all layers at once, against one injection a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laser_fast.ops import inject_prefix_kv, inject_prefix_kv_layers

from .prefix_kv_cases import Inputs, backend, dtype_cases, kind_cases, lengths_cases, make_inputs

__all__ = ["backend"]


def stacked(inputs: Inputs, num_layers: int) -> list[Tensor]:
    """[L, ...] of the four tensors, every layer with numbers of its own."""
    return [
        torch.stack([tensor + layer for layer in range(num_layers)])
        if num_layers
        else tensor.new_empty(0, *tensor.shape)
        for tensor in inputs.leaves
    ]


def assert_layers_equal(inputs: Inputs, num_layers: int) -> None:
    layers = stacked(inputs, num_layers)
    keys, values, cu_seqlens = inject_prefix_kv_layers(*layers, inputs.cu_seqlens, prefix_index=inputs.prefix_index)
    assert len(keys) == len(values) == num_layers
    for layer in range(num_layers):
        parts = [tensor[layer] for tensor in layers]
        expected = inject_prefix_kv(*parts, inputs.cu_seqlens, prefix_index=inputs.prefix_index)
        for actual, exact in zip((keys[layer], values[layer], cu_seqlens), expected, strict=True):
            assert actual.dtype == exact.dtype
            assert torch.equal(actual, exact)


@lengths_cases
@kind_cases
@pytest.mark.parametrize("prefix_length", [0, 3], ids="P={}".format)
def test_every_layer_equals_an_injection_of_its_own(
    backend: str, lengths: list[int], prefix_length: int, kind: str
) -> None:
    assert_layers_equal(make_inputs(lengths, prefix_length, kind), 3)


@dtype_cases
@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_dtypes_and_numbers_of_layers(backend: str, dtype: torch.dtype, num_layers: int) -> None:
    assert_layers_equal(make_inputs([3, 0, 5], 2, "pool", dtype), num_layers)


def test_any_number_of_threads_copies_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs([70, 0, 3, 150, 1, 25], 40, "shared", heads=(4, 256))
    for num_threads in (1, 2, 7):  # 7 threads split within layers
        monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
        assert_layers_equal(inputs, 5)


def test_strides(backend: str) -> None:
    inputs = make_inputs([3, 2], 2, "per-sequence")
    layers = stacked(inputs, 4)
    strided = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2)[::2] for tensor in layers]
    actual = inject_prefix_kv_layers(*strided, inputs.cu_seqlens)
    expected = inject_prefix_kv_layers(*[tensor.contiguous() for tensor in strided], inputs.cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert actual[0].is_contiguous()


@kind_cases
def test_opcheck_and_compile(backend: str, kind: str) -> None:
    inputs = make_inputs([3, 0, 5], 2, kind)
    arguments = (*stacked(inputs, 2), inputs.cu_seqlens)
    torch.library.opcheck(torch.ops.laser_fast.inject_prefix_kv_layers, (*arguments, inputs.prefix_index))
    torch.compiler.reset()
    compiled = torch.compile(inject_prefix_kv_layers, fullgraph=True, backend="aot_eager")
    actual = compiled(*arguments, prefix_index=inputs.prefix_index)
    expected = inject_prefix_kv_layers(*arguments, prefix_index=inputs.prefix_index)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradients_are_refused_where_they_are_recorded() -> None:
    inputs = make_inputs([3, 2], 2, "shared")
    for position, name in enumerate(("keys", "values", "prefix_keys", "prefix_values")):
        layers = stacked(inputs, 2)
        layers[position].requires_grad_()
        message = f"inject_prefix_kv_layers: {name} must not require a gradient, .*; use torch.no_grad, or"
        with pytest.raises(ValueError, match=message):
            inject_prefix_kv_layers(*layers, inputs.cu_seqlens)
        with torch.no_grad():
            inject_prefix_kv_layers(*layers, inputs.cu_seqlens)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(5, 2, 8)}, ValueError, r"keys must have 4 dimensions, got shape \(5, 2, 8\)"),
        ({"values": torch.zeros(2, 5, 2, 8).half()}, TypeError, "values must be torch.float32, got torch.float16"),
        ({"prefix_keys": torch.zeros(1, 2, 2, 8)}, ValueError, "prefix_keys must have 5 dimensions"),
        ({"values": torch.zeros(3, 5, 2, 8)}, ValueError, r"keys and values must have one shape"),
        (
            {"prefix_keys": torch.zeros(3, 1, 2, 2, 8), "prefix_values": torch.zeros(3, 1, 2, 2, 8)},
            ValueError,
            r"must agree in layers, heads and head width, got \(3, 1, 2, 2, 8\) and \(2, 5, 2, 8\)",
        ),
        (
            {"prefix_keys": torch.zeros(2, 3, 2, 2, 8), "prefix_values": torch.zeros(2, 3, 2, 2, 8)},
            ValueError,
            "prefix_keys must have 1 or B = 2 prefixes, got 3; a pool needs prefix_index",
        ),
        ({"cu_seqlens": torch.tensor([0, 4, 3], dtype=torch.int32)}, ValueError, "cu_seqlens must "),
        (
            {"prefix_index": torch.tensor([0, 1], dtype=torch.int32)},
            ValueError,
            "prefix_index must be between 0 and .* got 1",
        ),
    ],
)
def test_arguments_are_checked(backend: str, change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    inputs = make_inputs([3, 2], 2, "shared")
    names = ("keys", "values", "prefix_keys", "prefix_values")
    arguments = dict(zip(names, stacked(inputs, 2), strict=True)) | {"cu_seqlens": inputs.cu_seqlens} | change
    with pytest.raises(error, match=f"inject_prefix_kv_layers: .*{message}"):
        inject_prefix_kv_layers(**arguments)
