"""Injection with rotated text keys, against the rotary embedding of transformers followed by a plain injection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from laser_fast.ops import inject_prefix_kv, inject_prefix_kv_rotary, inject_prefix_kv_rotary_reference

from .prefix_kv_cases import (
    Inputs,
    backend,
    dtype_cases,
    inject_by_hand,
    kind_cases,
    lengths_cases,
    make_inputs,
    rotary_tables,
)

__all__ = ["backend"]


def inject(inputs: Inputs, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return inject_prefix_kv_rotary(*inputs[:5], cos, sin, prefix_index=inputs.prefix_index)


def rotated_by_transformers(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads_first = key.transpose(0, 1)[None]
    return apply_rotary_pos_emb(heads_first, heads_first, cos[None], sin[None])[1][0].transpose(0, 1)


@lengths_cases
@kind_cases
@pytest.mark.parametrize("prefix_length", [0, 3], ids="P={}".format)
def test_values_equal_transformers_and_a_loop(backend: str, lengths: list[int], prefix_length: int, kind: str) -> None:
    inputs = make_inputs(lengths, prefix_length, kind, torch.float64)
    cos, sin = rotary_tables(sum(lengths), 8, torch.float64)
    key, value, cu_seqlens = inject(inputs, cos, sin)
    exact = inject_by_hand(rotated_by_transformers(inputs.key, cos, sin), inputs.prefix_key, inputs)
    torch.testing.assert_close(key, exact, rtol=1e-15, atol=1e-15)  # two products and a sum
    assert torch.equal(value, inject_by_hand(inputs.value, inputs.prefix_value, inputs))
    assert torch.equal(cu_seqlens, inject_prefix_kv(*inputs[:5], prefix_index=inputs.prefix_index)[2])


@dtype_cases
@pytest.mark.parametrize("table", ["float32", "as-keys"])
@pytest.mark.parametrize("heads", [(2, 8), (3, 32), (1, 2), (2, 6)], ids=str)
def test_rotation_is_rounded_once(
    backend: str, dtype: torch.dtype, table: str, heads: tuple[int, int], assert_accurate: Callable[..., None]
) -> None:
    inputs = make_inputs([3, 0, 5], 2, "shared", dtype, heads)
    cos, sin = rotary_tables(8, heads[1], torch.float32 if table == "float32" else dtype)
    actual = inject(inputs, cos, sin)
    double = Inputs(*[tensor.double() for tensor in inputs.leaves], inputs.cu_seqlens, None)
    exact = inject_prefix_kv_rotary_reference(*double[:5], cos.double(), sin.double())
    # eager PyTorch in float32 with one rounding at the end
    wide = rotated_by_transformers(inputs.key.to(torch.promote_types(dtype, torch.float32)), cos, sin).to(dtype)
    eager = inject_prefix_kv(wide, *inputs[1:5])
    assert actual[0].dtype == dtype
    assert_accurate(actual[0], eager[0], exact[0], "key")
    assert torch.equal(actual[1], eager[1])
    prefix_rows = [0, 1, 5, 6, 7, 8]  # behind texts of 3 and 0
    assert torch.equal(actual[0][prefix_rows], inputs.prefix_key[0].repeat(3, 1, 1))


@kind_cases
def test_gradcheck(backend: str, kind: str) -> None:
    inputs = make_inputs([3, 0, 2], 2, kind, torch.float64, heads=(1, 4))
    tables = rotary_tables(5, 4, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]

    def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
        return inject_prefix_kv_rotary(*tensors, inputs.cu_seqlens, *tables, prefix_index=inputs.prefix_index)[:2]

    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


@dtype_cases
@kind_cases
def test_gradients_equal_autograd_of_the_reference(
    backend: str, dtype: torch.dtype, kind: str, assert_accurate: Callable[..., None]
) -> None:
    inputs = make_inputs([30, 0, 2, 17], 3, kind, dtype, heads=(2, 16))
    cos, sin = rotary_tables(49, 16)
    grads = torch.autograd.grad(
        sum(x.to(torch.float64).square().sum() for x in inject(grads_on(inputs), cos, sin)[:2]), inputs.leaves
    )
    exact = reference_gradients(inputs, torch.float64, cos, sin)
    # a reference in the dtype rounds products and sums, one in float32 rounds once: either bounds the error
    eager = [
        grad.to(dtype) for grad in reference_gradients(inputs, torch.promote_types(dtype, torch.float32), cos, sin)
    ]
    for name, actual, plain, true in zip(inputs._fields, grads, eager, exact, strict=False):
        # the squared output was rounded to the dtype, so its gradient is off by that much before backward starts
        slack = [plain, plain * (1 + 2 * torch.finfo(dtype).eps)]
        assert_accurate(actual, slack, true, name)


def grads_on(inputs: Inputs) -> Inputs:
    for tensor in inputs.leaves:
        tensor.requires_grad_()
    return inputs


def reference_gradients(inputs: Inputs, dtype: torch.dtype, cos: Tensor, sin: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs.leaves]
    injected = inject_prefix_kv_rotary_reference(*leaves, inputs.cu_seqlens, cos, sin, prefix_index=inputs.prefix_index)
    loss = sum(x.to(torch.float64).square().sum() for x in injected[:2])
    return [grad.to(dtype) for grad in torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads_computes_the_same(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs([700, 0, 3, 1500, 1, 250], 40, "pool", heads=(4, 256))
    cos, sin = rotary_tables(2454, 256)
    exact = inject_prefix_kv_rotary_reference(*inputs[:5], cos, sin, prefix_index=inputs.prefix_index)
    once = inject(inputs, cos, sin)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    actual = inject(inputs, cos, sin)
    assert torch.equal(actual[0], once[0])
    assert torch.equal(actual[1], exact[1])
    torch.testing.assert_close(actual[0], exact[0])


@kind_cases
def test_opcheck(backend: str, kind: str) -> None:
    inputs = make_inputs([3, 0, 5], 2, kind)
    cos, sin = rotary_tables(8, 8)
    for needs_grad in (False, True):
        leaves = [tensor.detach().clone().requires_grad_(needs_grad) for tensor in inputs.leaves]
        arguments = (*leaves, inputs.cu_seqlens, cos, sin, inputs.prefix_index)
        torch.library.opcheck(torch.ops.laser_fast.inject_prefix_kv_rotary, arguments)
    grads = [torch.randn(14, 2, 8).requires_grad_() for _ in range(2)]
    layout = (inputs.cu_seqlens, cos, sin, inputs.prefix_index, list(inputs.prefix_key.shape[:2]))
    for needs in ([True] * 4, [False, True, True, False]):
        torch.library.opcheck(torch.ops.laser_fast.inject_prefix_kv_rotary_backward, (*grads, *layout, needs))


def test_compiles_without_a_graph_break() -> None:
    inputs = make_inputs([3, 0, 5], 2, "pool")
    cos, sin = rotary_tables(8, 8)
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    torch.compiler.reset()
    compiled = torch.compile(inject_prefix_kv_rotary, fullgraph=True, backend="aot_eager")
    actual = compiled(*inputs[:5], cos, sin, prefix_index=inputs.prefix_index)
    expected = inject(inputs, cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    ours = torch.autograd.grad(actual[0].square().sum() + actual[1].sum(), leaves)
    theirs = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cos": torch.zeros(5, 8).half()}, TypeError, "cos must be torch.float32 or torch.float32, got torch.float16"),
        ({"sin": torch.zeros(5, 8).double()}, TypeError, "sin must be torch.float32, got torch.float64"),
        ({"cos": torch.zeros(4, 8)}, ValueError, r"cos must have shape \[T, d\] = \(5, 8\), got \(4, 8\)"),
        ({"sin": torch.zeros(5, 4)}, ValueError, r"sin must have shape \[T, d\] = \(5, 8\), got \(5, 4\)"),
        ({"sin": torch.zeros(5, 8, requires_grad=True)}, ValueError, "sin must not require a gradient"),
        ({"cos": torch.zeros(5, 8, device="meta")}, ValueError, "one device, got .*cos on meta"),
        ({"value": torch.zeros(4, 2, 8)}, ValueError, "key and value must have one shape"),
        ({"prefix_index": torch.zeros(3, dtype=torch.int32)}, ValueError, "prefix_index must have shape"),
        ({"cu_seqlens": torch.tensor([0, 4, 3], dtype=torch.int32)}, ValueError, "cu_seqlens must "),
        (
            {"prefix_index": torch.tensor([0, 1], dtype=torch.int32)},
            ValueError,
            "prefix_index must lie within .* got 1",
        ),
    ],
)
def test_arguments_are_checked(backend: str, change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    cos, sin = rotary_tables(5, 8)
    arguments = make_inputs([3, 2], 2, "shared")._asdict() | {"cos": cos, "sin": sin} | change
    with pytest.raises(error, match=f"inject_prefix_kv_rotary: .*{message}"):
        inject_prefix_kv_rotary(**arguments)


def test_an_odd_head_size_is_refused() -> None:
    inputs = make_inputs([3, 2], 2, "shared", heads=(2, 3))
    with pytest.raises(ValueError, match="inject_prefix_kv_rotary: key must have an even head size, got 3"):
        inject_prefix_kv_rotary(*inputs[:5], torch.zeros(5, 3), torch.zeros(5, 3))
