"""Prefix injection backward: gathers that lose nothing, and sums in one order, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laser_fast.ops import inject_prefix_kv, inject_prefix_kv_reference

from .prefix_kv_cases import (
    Inputs,
    backend,
    dtype_cases,
    kind_cases,
    lengths_cases,
    make_inputs,
    prefix_cases,
    prefix_of,
)

__all__ = ["backend"]

ALL = [True] * 4


def backward(grad_key: Tensor | None, grad_value: Tensor | None, inputs: Inputs, needs: list[bool]) -> list[Tensor]:
    layout = inputs.cu_seqlens, inputs.prefix_index, list(inputs.prefix_key.shape[:2]), needs
    return torch.ops.laser_fast.inject_prefix_kv_backward(grad_key, grad_value, *layout)


def output_grads(inputs: Inputs) -> tuple[Tensor, Tensor]:
    rows = inputs.key.shape[0] + (len(inputs.cu_seqlens) - 1) * inputs.prefix_key.shape[1]
    generator = torch.Generator().manual_seed(7)
    shape = rows, *inputs.key.shape[1:]
    return tuple(torch.randn(shape, generator=generator).to(inputs.key.dtype) for _ in range(2))


def gradients_by_hand(grad: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A loop over sequences, in float64."""
    grad, length = grad.double(), inputs.prefix_key.shape[1]
    text = torch.zeros(inputs.key.shape, dtype=torch.float64)
    prefix = torch.zeros(inputs.prefix_key.shape, dtype=torch.float64)
    bounds = inputs.cu_seqlens.tolist()
    for b in range(len(bounds) - 1):
        begin = bounds[b] + b * length
        prefix[prefix_of(inputs, b)] += grad[begin : begin + length]
        text[bounds[b] : bounds[b + 1]] = grad[begin + length : begin + length + bounds[b + 1] - bounds[b]]
    return text, prefix


@lengths_cases
@prefix_cases
@kind_cases
def test_gradients_equal_a_loop(backend: str, lengths: list[int], prefix_length: int, kind: str) -> None:
    inputs = make_inputs(lengths, prefix_length, kind, torch.float64)
    grads = output_grads(inputs)
    key, value, prefix_key, prefix_value = backward(*grads, inputs, ALL)
    for grad, text, prefix in ((grads[0], key, prefix_key), (grads[1], value, prefix_value)):
        exact_text, exact_prefix = gradients_by_hand(grad, inputs)
        assert torch.equal(text, exact_text)
        torch.testing.assert_close(prefix, exact_prefix, rtol=0, atol=1e-12)  # sums of up to 300 in another order
        if kind == "per-sequence":
            assert torch.equal(prefix, exact_prefix)


@dtype_cases
@pytest.mark.parametrize("kind", ["shared", "pool"])
def test_sums_are_rounded_once(backend: str, dtype: torch.dtype, kind: str) -> None:
    inputs = make_inputs([(5 * b) % 7 for b in range(100)], 3, kind, dtype)
    grads = output_grads(inputs)
    _, _, *prefixes = backward(*grads, inputs, ALL)
    for grad, prefix in zip(grads, prefixes, strict=True):
        exact = gradients_by_hand(grad, inputs)[1]
        assert prefix.dtype == dtype
        # half a unit in the last place where float32 holds the sum exactly enough, else 100 additions in the dtype
        unit = torch.finfo(dtype).eps * (0.502 if dtype.itemsize == 2 else 20)
        assert ((prefix.double() - exact).abs() <= unit * exact.abs() + 1e-5 * (dtype != torch.float64)).all()


def test_half_precision_sums_hold_every_bit_pattern(backend: str) -> None:
    # 65536 numbers of each type, summed with nothing: what comes out is what went in
    needs = [False, False, True, False]
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = patterns.view(dtype).view(2**15, 1, 2)
        layout = torch.tensor([0, 0, 0], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        grad = torch.cat([numbers[: 2**14], numbers[2**14 :]])
        _, _, prefix, _ = torch.ops.laser_fast.inject_prefix_kv_backward(grad, None, *layout, [2, 2**14], needs)
        finite = grad.isfinite()
        assert torch.equal(prefix.view(grad.shape)[finite], grad[finite])
        assert torch.equal(prefix.view(grad.shape).isnan(), grad.isnan())
        assert torch.equal(prefix.view(grad.shape).isinf(), grad.isinf())


def test_the_sum_runs_in_float32_and_rounds_to_even(backend: str) -> None:
    # in bfloat16, 256 + 1 stays 256: a sum in that precision would lose all ones
    inputs = make_inputs([1] * 512, 1, "shared", torch.bfloat16)
    ones = torch.ones(1024, 2, 8, dtype=torch.bfloat16)
    assert (backward(ones, ones, inputs, ALL)[2] == 512).all()
    # 1 + 2^-8 lies between two numbers of bfloat16, and 1 + 3 * 2^-8 as well: both ties go to the even one
    for addend, sum_to_even in ((2.0**-8, 1.0), (3 * 2.0**-8, 1 + 2.0**-6)):
        pair = torch.stack([torch.ones(2, 8), torch.full((2, 8), addend)]).bfloat16()
        two = make_inputs([0, 0], 1, "shared", torch.bfloat16)
        assert (backward(pair, None, two, [False, False, True, False])[2] == sum_to_even).all()


@kind_cases
@pytest.mark.parametrize("num_threads", [1, 3])
def test_sums_are_bit_equal_from_run_to_run(num_threads: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs([(5 * b) % 70 for b in range(64)], 32, kind, heads=(4, 256))
    grads = output_grads(inputs)
    once = backward(*grads, inputs, ALL)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(backward(*grads, inputs, ALL), once, strict=True))


def test_what_nobody_needs_has_no_rows(backend: str) -> None:
    inputs = make_inputs([3, 0, 2], 2, "shared")
    grads = output_grads(inputs)
    whole = backward(*grads, inputs, ALL)
    for needed in range(4):
        needs = [index == needed for index in range(4)]
        parts = backward(*grads, inputs, needs)
        assert [len(part) > 0 for part in parts] == needs
        assert torch.equal(parts[needed], whole[needed])
    alone = backward(None, grads[1], inputs, [False, True, False, True])
    assert torch.equal(alone[1], whole[1])
    assert torch.equal(alone[3], whole[3])


@kind_cases
@pytest.mark.parametrize("lengths", [[3, 0, 2], []], ids=["several", "none"])
def test_gradcheck_and_autograd_of_the_reference(backend: str, lengths: list[int], kind: str) -> None:
    inputs = make_inputs(lengths, 2, kind, torch.float64, heads=(1, 2))
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]

    def ours(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return inject_prefix_kv(*tensors, inputs.cu_seqlens, prefix_index=inputs.prefix_index)[:2]

    reference = inject_prefix_kv_reference(*leaves, inputs.cu_seqlens, prefix_index=inputs.prefix_index)
    actual = torch.autograd.grad(sum(x.square().sum() for x in ours(*leaves)), leaves)
    expected = torch.autograd.grad(sum(x.square().sum() for x in reference[:2]), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)  # a sum over sequences adds in another order than the reference
    if lengths:
        assert torch.autograd.gradcheck(ours, leaves)
        assert torch.autograd.gradgradcheck(ours, leaves)


def test_gradients_that_nobody_needs_stay_none(backend: str) -> None:
    for needed in range(4):
        inputs = make_inputs([3, 2], 2, "pool")
        inputs[needed].requires_grad_()
        injected = inject_prefix_kv(*inputs[:5], prefix_index=inputs.prefix_index)
        (injected[0].sum() + injected[1].sum()).backward()
        assert [tensor.grad is not None for tensor in inputs.leaves] == [index == needed for index in range(4)]
        assert not injected[2].requires_grad


def test_a_half_without_a_loss_costs_nothing(backend: str) -> None:
    inputs = make_inputs([3, 2], 2, "shared")
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    loss = inject_prefix_kv(*inputs[:5])[1].sum()
    key, value, prefix_key, prefix_value = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert key is None and prefix_key is None
    assert (value == 1).all()
    assert (prefix_value == 2).all()  # from two sequences


def test_inputs_stay_and_two_backwards_are_bit_equal(backend: str) -> None:
    inputs = make_inputs([3, 0, 40], 4, "pool", torch.float16)
    kept = [tensor.clone() for tensor in inputs.leaves]
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    injected = inject_prefix_kv(*inputs[:5], prefix_index=inputs.prefix_index)
    loss = injected[0].float().square().sum() + injected[1].float().sum()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, leaves, strict=True))


@kind_cases
@pytest.mark.parametrize("needs", [ALL, [True, False, False, True]], ids=["all", "some"])
def test_opcheck(backend: str, kind: str, needs: list[bool]) -> None:
    inputs = make_inputs([3, 0, 2], 2, kind)
    grads = [grad.requires_grad_() for grad in output_grads(inputs)]
    arguments = *grads, inputs.cu_seqlens, inputs.prefix_index, list(inputs.prefix_key.shape[:2]), needs
    torch.library.opcheck(torch.ops.laser_fast.inject_prefix_kv_backward, arguments)
    without_key = None, *arguments[1:5], [False, True, False, True]
    torch.library.opcheck(torch.ops.laser_fast.inject_prefix_kv_backward, without_key)


def test_bad_offsets_are_refused(backend: str) -> None:
    if backend == "reference":
        pytest.skip("gradients follow a forward pass, which has checked them")
    inputs = make_inputs([5, 0], 2, "shared")
    grads = output_grads(inputs)
    bad = inputs._replace(cu_seqlens=torch.tensor([0, 5, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="inject_prefix_kv_backward: cu_seqlens must not decrease, got 5 before 4"):
        backward(*grads, bad, ALL)
