"""What every launcher promises: strides do not matter, inputs stay, only results are written, runs are bit-equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from laser_fast.kernels import dispatch, gated_product, rms_norm
from laser_fast.kernels.rotary import rotary
from laser_fast.kernels.routing import route_forward
from laser_fast.kernels.routing_backward import route_backward

Make = Callable[..., Any]


class Launch(NamedTuple):
    """A call `run(*inputs)`, and how many tensors it allocates."""

    run: Callable[..., Sequence[Tensor]]
    inputs: tuple[Tensor, ...]
    allocated: int


def _numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(23)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _forward(make: Make, dtype: torch.dtype, *sizes: Any) -> Launch:
    *inputs, cu_seqlens, top_k = make(*sizes, dtype)
    return Launch(lambda *given: route_forward(*given, cu_seqlens, top_k, "softmax"), tuple(inputs), 7)


def _backward(make: Make, dtype: torch.dtype, needs: tuple[bool, bool], *sizes: Any) -> Launch:
    inputs = make(*sizes, dtype)
    result = route_forward(*inputs, "softmax")
    grads = [grad.to(result.weight) for grad in _numbers(result.weight.shape, result.pooled.shape)]

    def run(states: Tensor, router: Tensor, *grads: Tensor) -> Sequence[Tensor]:
        arguments = (*grads, result.balance_loss), states, router, inputs.cu_seqlens, result
        return route_backward(*arguments, weighting="softmax", needs=needs)

    return Launch(run, (*inputs[:2], *grads), 5)


def _dispatch(make: Make, dtype: torch.dtype, num_experts: int, slab: tuple[int, int]) -> Launch:
    expert = torch.tensor([[1, 0], [4, 2], [3, 1]], dtype=torch.int32)
    numbers = _numbers((num_experts, *slab), (6, *slab), (3, *slab))
    queries, outputs, grad = (tensor.to(dtype) for tensor in numbers)

    def run(queries: Tensor, outputs: Tensor, grad: Tensor, expert: Tensor, weight: Tensor) -> Sequence[Tensor]:
        given = grad, outputs, weight
        return [
            dispatch.dispatch_forward(queries, expert),
            dispatch.dispatch_backward(outputs, expert, num_experts),
            dispatch.combine_forward(outputs, weight),
            *dispatch.combine_backward(*given, needs_outputs=True, needs_weight=True),
            *dispatch.combine_backward(*given, needs_outputs=True, needs_weight=False),
            *dispatch.combine_backward(*given, needs_outputs=False, needs_weight=True),
        ]

    return Launch(run, (queries, outputs, grad, expert, torch.rand(3, 2)), 9)


def _product(make: Make, dtype: torch.dtype, *shape: int) -> Launch:
    def run(gate: Tensor, up: Tensor, grad: Tensor) -> Sequence[Tensor]:
        grads = gate.new_empty(shape), up.new_empty(shape)
        gated_product.gated_product_backward(grad, gate, up, "gelu_tanh", *grads)
        return gated_product.gated_product_forward(gate, up, "gelu_tanh"), *grads

    return Launch(run, tuple(tensor.to(dtype) for tensor in _numbers(shape, shape, shape)), 3)


def _norm(make: Make, dtype: torch.dtype, *shape: int) -> Launch:
    def run(x: Tensor, weight: Tensor, grad: Tensor) -> Sequence[Tensor]:
        y, reciprocal = rms_norm.rms_norm_forward(x, weight, 1e-6, 0.0, True)
        again, _ = rms_norm.rms_norm_forward(x, weight, 1e-6, 0.0, True, reciprocal)
        return y, again, reciprocal, rms_norm.rms_norm_backward(grad, x, reciprocal, weight, 0.0)

    return Launch(run, tuple(tensor.to(dtype) for tensor in _numbers(shape, shape[-1:], shape)), 4)


def _rotation(make: Make, dtype: torch.dtype, heads: tuple[int, int], size: int, width: int) -> Launch:
    shapes = [*((5, number, size) for number in heads), (5, width), (5, width)]

    def run(*given: Tensor) -> Sequence[Tensor]:
        return *rotary(*given, transposed=False), *rotary(*given, transposed=True)

    return Launch(run, tuple(tensor.to(dtype) for tensor in _numbers(*shapes)), 4)


BATCHES = (((0, 3, 0, 5, 1, 0), 5, 7, 3), ((40, 0, 25), 129, 8, 3), ((9, 5), 50, 33, 4))  # lengths, width, experts, k
LAUNCHES: dict[str, tuple[Callable[..., Launch], tuple[Any, ...]]] = {
    **{f"route-forward-E{sizes[2]}": (_forward, sizes) for sizes in BATCHES},
    **{f"route-backward-E{sizes[2]}": (_backward, ((True, True), *sizes)) for sizes in BATCHES},
    "route-backward-bias-alone": (_backward, ((False, False), *BATCHES[1])),
    **{
        f"dispatch-E{experts}-{slab}": (_dispatch, (experts, slab))
        for experts in (5, 33)
        for slab in ((3, 7), (25, 41))
    },
    **{f"product-{shape}": (_product, shape) for shape in ((3, 5), (2, 3, 40), (2, 1025))},
    **{f"norm-{shape}": (_norm, shape) for shape in ((3, 5), (17, 128), (2, 1100))},
    "rotary": (_rotation, ((9, 3), 128, 128)),
    "rotary-partial": (_rotation, ((2, 1), 80, 32)),
}
STRIDED = ("forward-E7", "backward-E7", "dispatch-E5", "40)", "128)", "partial")  # one of each


@pytest.fixture(params=LAUNCHES)
def build(request: pytest.FixtureRequest, routing_inputs: Make, device: torch.device) -> Callable[..., Launch]:
    builder, sizes = LAUNCHES[request.param]

    def make(dtype: torch.dtype) -> Launch:
        launch = builder(routing_inputs, dtype, *sizes)
        return launch._replace(inputs=tuple(tensor.to(device) for tensor in launch.inputs))

    return make


def _strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in other places, but for "expanded": the first row for all."""
    other = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 3)
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "every-other-column":
        return torch.stack([tensor, other], dim=-1)[..., 0]
    if how == "rows-apart":
        return torch.cat([tensor, other], dim=-1)[..., : tensor.shape[-1]]
    return tensor[:1].expand(tensor.shape)


@pytest.mark.parametrize("how", ["transposed", "every-other-column", "rows-apart", "expanded"])
@pytest.mark.parametrize("build", [name for name in LAUNCHES if name.endswith(STRIDED)], indirect=True)
def test_strides_do_not_matter_and_inputs_stay_as_they_were(how: str, build: Callable[..., Launch]) -> None:
    run, inputs, _ = build(torch.float16)
    strided = [_strided(tensor, how) for tensor in inputs]
    assert not strided[0].is_contiguous()
    before = [tensor.clone() for tensor in strided]
    expected = run(*[tensor.contiguous() for tensor in strided])
    for one, other in zip(run(*strided), expected, strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, other)
    assert all(torch.equal(now, then) for now, then in zip(strided, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_nothing_is_written_but_the_results_and_two_launches_are_bit_equal(
    dtype: torch.dtype, build: Callable[..., Launch], guarded_memory: type
) -> None:
    run, inputs, allocated = build(dtype)
    memory = guarded_memory()
    with memory:
        guarded = run(*inputs)
    memory.assert_untouched()
    assert len(memory.buffers) == allocated
    assert all(torch.equal(one, other) for one, other in zip(guarded, run(*inputs), strict=True))
