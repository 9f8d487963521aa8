"""Kernels of RMSNorm, forward and backward, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from laser_fast.kernels import rms_norm as kernels
from laser_fast.ops.rms_norm import NormKind, _scale, rms_norm_reference

from .kernel_cases import DTYPES

Check = Callable[..., None]
KINDS = [
    pytest.param(NormKind(0.0, True, 1e-6), id="late-weight"),
    pytest.param(NormKind(0.0, False, 1e-5), id="early-weight"),
    pytest.param(NormKind(1.0, False, 1e-6), id="offset"),
]
SHAPES = [
    pytest.param((6, 1), id="width-1"),
    pytest.param((1, 1, 48), id="one-row"),
    pytest.param((0, 48), id="no-row"),
    pytest.param((2, 3, 37), id="odd-width"),
    pytest.param((1, 4, 3, 128), id="one-short-of-a-tile"),
    pytest.param((33, 96), id="one-past-two-tiles"),
    pytest.param((3, 1100), id="one-row-a-program"),
    pytest.param((2, 5000), id="wide"),
]


class Inputs(NamedTuple):
    """A row's numbers, the weight, and the gradient of y."""

    x: Tensor
    weight: Tensor
    grad: Tensor

    def double(self) -> Inputs:
        return Inputs(*[tensor.double() for tensor in self])


@pytest.fixture
def make(device: torch.device) -> Callable[..., Inputs]:
    def inner(
        shape: tuple[int, ...], dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None
    ) -> Inputs:
        generator = torch.Generator().manual_seed(13)
        x, weight, grad = (torch.randn(size, generator=generator) for size in (shape, shape[-1:], shape))
        return Inputs((x * 3.0).to(device, dtype), weight.to(device, weight_dtype or dtype), grad.to(device, dtype))

    return inner


def _forward(inputs: Inputs, kind: NormKind, reciprocal: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return kernels.rms_norm_forward(inputs.x, inputs.weight, kind.eps, kind.offset, kind.late_weight, reciprocal)


def _both(inputs: Inputs, kind: NormKind) -> tuple[Tensor, Tensor, Tensor]:
    y, reciprocal = _forward(inputs, kind)
    return y, reciprocal, kernels.rms_norm_backward(inputs.grad, inputs.x, reciprocal, inputs.weight, kind.offset)


def _autograd(inputs: Inputs, kind: NormKind) -> tuple[Tensor, Tensor]:
    leaf = inputs.x.detach().requires_grad_()
    y = rms_norm_reference(leaf, inputs.weight, kind)
    return y.detach(), torch.autograd.grad(y, leaf, inputs.grad.to(y.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_autograd(
    shape: tuple[int, ...], kind: NormKind, dtype: torch.dtype, make: Callable[..., Inputs], assert_accurate: Check
) -> None:
    inputs = make(shape, dtype)
    y, reciprocal, grad_x = _both(inputs, kind)
    exact, eager = _autograd(inputs.double(), kind), _autograd(inputs, kind)
    assert_accurate(y, eager[0], exact[0], "y")
    if shape[-1] > 1:  # of one number the gradient is 0 but for eps, and all digits cancel
        assert_accurate(grad_x, eager[1], exact[1], "x")
    assert (reciprocal.shape, reciprocal.dtype) == ((*shape[:-1], 1), torch.float32)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=["fp32-weight", "fp16-weight"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_rounds_where_eager_rounds_bit_for_bit(
    kind: NormKind, dtype: torch.dtype, weight_dtype: torch.dtype, make: Callable[..., Inputs]
) -> None:
    inputs = make((40, 200), dtype, weight_dtype)
    y, reciprocal = _forward(inputs, kind)
    expected = _scale(inputs.x, reciprocal, inputs.weight, kind)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    again, given = _forward(inputs, kind, reciprocal)
    assert given is reciprocal
    assert torch.equal(again, y)


@pytest.mark.parametrize("kind", KINDS)
def test_large_small_and_zero_rows(kind: NormKind, make: Callable[..., Inputs], assert_accurate: Check) -> None:
    inputs = make((4, 300), torch.float16)
    scales = torch.tensor([[6e3], [1e-4], [1.0], [0.0]], device=inputs.x.device)
    inputs = inputs._replace(x=(inputs.x.float() * scales).half())
    y, reciprocal, grad_x = _both(inputs, kind)
    assert inputs.x[0].float().square().sum() > torch.finfo(torch.float16).max
    exact = _autograd(inputs.double(), kind)
    assert_accurate(y[:3], _autograd(inputs, kind)[0][:3], exact[0][:3], "y")
    assert y[3].abs().max() == 0.0
    assert float(reciprocal[3]) == pytest.approx(kind.eps**-0.5)
    assert grad_x.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_a_nan_stays_in_its_row(make: Callable[..., Inputs]) -> None:
    inputs = make((35, 100))
    broken = inputs._replace(x=inputs.x.clone())
    broken.x[17, 4] = torch.nan
    others = [row for row in range(35) if row != 17]
    for ours, theirs in zip(_both(broken, KINDS[0].values[0]), _both(inputs, KINDS[0].values[0]), strict=True):
        assert ours[17].isnan().all()
        assert torch.equal(ours[others], theirs[others])


def test_a_tile_holds_whole_rows_and_a_lane_16_numbers() -> None:
    tiles = {width: tuple(kernels._tile(width).values()) for width in (1, 96, 128, 2048, 4096, 5120, 16384, 32768)}
    assert tiles == {
        1: (2048, 1, 4),
        96: (16, 128, 4),
        128: (16, 128, 4),
        2048: (1, 2048, 4),
        4096: (1, 4096, 8),
        5120: (1, 8192, 16),
        16384: (1, 16384, 32),
        32768: (1, 32768, 32),
    }
