"""RMSNorm as an operation: what runs where, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from laser_fast.ops import backends
from laser_fast.ops import rms_norm as operation
from laser_fast.ops.rms_norm import MAX_WIDTH, NormKind, rms_norm_backward, rms_norm_forward, rms_norm_reference

KINDS = [
    pytest.param(NormKind(0.0, True, 1e-6), id="late-weight"),
    pytest.param(NormKind(0.0, False, 1e-5), id="early-weight"),
    pytest.param(NormKind(1.0, False, 1e-6), id="offset"),
]


def _inputs(dtype: torch.dtype = torch.float64, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(2, 3, 11, generator=generator, dtype=dtype) for _ in range(2))
    return [x, torch.randn(11, generator=generator, dtype=weight_dtype or dtype), grad]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_on_a_cpu_is_that_of_autograd(kind: NormKind) -> None:
    x, weight, grad = _inputs()
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: rms_norm_reference(given, weight, kind), leaf)
    expected = rms_norm_reference(leaf, weight, kind)
    y, reciprocal = rms_norm_forward(x, weight, kind)
    assert torch.equal(y, expected)
    assert torch.equal(rms_norm_forward(x, weight, kind, reciprocal)[0], y)
    actual = rms_norm_backward(grad, x, reciprocal, weight, kind)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaf, grad)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_without_values_there_is_what_a_gpu_would_allocate(kind: NormKind, weight_dtype: torch.dtype) -> None:
    given = _inputs(torch.bfloat16, weight_dtype)
    x, weight, grad = (tensor.to("meta") for tensor in given)
    expected = rms_norm_forward(*given[:2], kind)
    for ours, theirs in zip(rms_norm_forward(x, weight, kind), expected, strict=True):
        assert (ours.shape, ours.dtype, ours.device.type) == (theirs.shape, theirs.dtype, "meta")
    again = rms_norm_forward(x, weight, kind, expected[1].to("meta"))[0]
    assert again.dtype == expected[0].dtype
    grad_x = rms_norm_backward(grad, x, expected[1].to("meta"), weight, kind)
    assert (grad_x.shape, grad_x.dtype, grad_x.device.type) == (x.shape, x.dtype, "meta")


class OnGpu:
    """As much of a tensor on a CUDA device as is asked for."""

    device = torch.device("cuda", 0)

    def __init__(self, width: int, dtype: torch.dtype = torch.float16) -> None:
        self.shape, self.dtype = torch.Size((4, width)), dtype


def test_the_kernel_serves_rows_that_fit_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_absence", lambda index: "")
    weight: Any = OnGpu(1)
    widths: list[Any] = [OnGpu(width) for width in (0, 1, MAX_WIDTH, MAX_WIDTH + 1)]
    assert [operation._kernel_serves(x, weight) for x in widths] == [False, True, True, False]
    double: Any = OnGpu(8, torch.float64)
    assert not operation._kernel_serves(widths[1], double)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, grad = _inputs(torch.float32)
    kind = NormKind(0.0, True, 1e-6)
    with pytest.raises(TypeError, match="rms_norm_forward: x and weight must be floating point, got torch.int64 and"):
        rms_norm_forward(x.long(), weight, kind)
    with pytest.raises(ValueError, match=r"one entry per column of x, got \(10,\) and x \(2, 3, 11\)"):
        rms_norm_forward(x, weight[1:], kind)
    with pytest.raises(ValueError, match="on one device, got x on cpu, weight on meta"):
        rms_norm_forward(x, weight.to("meta"), kind)
    with pytest.raises(ValueError, match=r"grad must have the shape of x \(2, 3, 11\), got \(2, 3, 10\)"):
        rms_norm_backward(grad[..., 1:], x, x[..., :1], weight, kind)
    for given in (torch.ones(2, 2, 1), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"rms_norm_forward: reciprocal must have shape \(2, 3, 1\), got"):
            rms_norm_forward(x, weight, kind, given)
        with pytest.raises(ValueError, match=r"rms_norm_backward: reciprocal must have shape \(2, 3, 1\), got"):
            rms_norm_backward(x, x, given, weight, kind)
    with pytest.raises(TypeError, match=r"reciprocal must be torch.float32, got torch.float16"):
        rms_norm_backward(x, x, x[..., :1].half(), weight, kind)
    with pytest.raises(RuntimeError, match="must need no gradient, got one that does; use an autograd function"):
        rms_norm_forward(x.requires_grad_(), weight, kind)
