"""Routing, dispatch and combine as whole operations, in torch and as kernels: autograd, fakes, flags, dtypes.

Without a GPU the kernels serve CPU tensors, in Triton's interpreter. Accuracy at the edges: tests/kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from laser_fast.nn.mformer import MFormer
from laser_fast.ops import (
    combine_queries,
    combine_queries_reference,
    dispatch_queries,
    dispatch_queries_reference,
    route_experts,
    route_experts_reference,
)

Check = Callable[..., None]
NAMES = ("states", "router", "bias", "queries")
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter truncates where GPUs round
]


@pytest.fixture(params=["torch", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the operations run, and as what."""
    if request.param == "interpreter":
        request.getfixturevalue("triton_on_cpu")
    elif request.param == "cuda":
        pytest.importorskip("triton", reason="the kernels are written in Triton")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


class Batch(NamedTuple):
    """Inputs of all three operations; the first four have gradients."""

    states: Tensor
    router: Tensor
    bias: Tensor
    queries: Tensor
    cu_seqlens: Tensor

    def leaves(self) -> list[Tensor]:
        return [tensor.detach().clone().requires_grad_() for tensor in self[:4]]


def _batch(device: torch.device, dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = (5, 0, 20, 1)) -> Batch:
    generator = torch.Generator().manual_seed(11)
    states = torch.randn(sum(lengths), 24, generator=generator)
    router = torch.randn(7, 24, generator=generator) / 24**0.5
    bias, queries = torch.randn(7, generator=generator), torch.randn(7, 3, 10, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = states.to(dtype), router, bias, queries.to(dtype), cu_seqlens
    return Batch(*[tensor.to(device) for tensor in tensors])


OPERATIONS = route_experts, dispatch_queries, combine_queries
REFERENCES = route_experts_reference, dispatch_queries_reference, combine_queries_reference


def _loss(
    leaves: list[Tensor], cu_seqlens: Tensor, functions: Any = OPERATIONS, expert: Tensor | None = None
) -> Tensor:
    """A scalar in which every differentiable result counts."""
    route, dispatch, combine = functions
    states, router, bias, queries = leaves
    decided = {} if expert is None else {"expert": expert}  # which the references alone keep
    routing = route(states, router, bias, cu_seqlens, 3, weighting="renormalize", **decided)
    combined = combine(dispatch(queries, routing.expert).sin(), routing.weight)
    ramp = torch.arange(1, combined.numel() + 1, device=combined.device).view(combined.shape) / combined.numel()
    return (combined * ramp).double().sum() + routing.pooled.square().sum() * 3 + routing.balance_loss * 5


def _grads(batch: Batch, functions: Any = OPERATIONS, expert: Tensor | None = None) -> tuple[Tensor, ...]:
    leaves = batch.leaves()
    return torch.autograd.grad(_loss(leaves, batch.cu_seqlens, functions, expert), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_accurate_as_those_of_the_references(
    dtype: torch.dtype, device: torch.device, assert_accurate: Check
) -> None:
    batch = _batch(device, dtype)
    wide = Batch(*[tensor.double() for tensor in batch[:4]], batch.cu_seqlens)
    expert = route_experts(*batch[:3], batch.cu_seqlens, 3, weighting="renormalize").expert
    assert torch.equal(expert, route_experts_reference(*wide[:3], batch.cu_seqlens, 3).expert)
    eager, exact = _grads(batch, REFERENCES, expert), _grads(wide, REFERENCES, expert)
    for name, *tensors in zip(NAMES, _grads(batch), eager, exact, strict=True):
        assert_accurate(*tensors, name)


def test_the_kernels_serve_forward_and_backward(triton_on_cpu: list[str]) -> None:
    _grads(_batch(torch.device("cpu")))
    forward = ["route_experts", "dispatch_queries", "combine_queries"]
    assert triton_on_cpu == forward + forward[::-1]


def test_float64_stays_with_the_reference(triton_on_cpu: list[str]) -> None:
    batch = _batch(torch.device("cpu"))
    _grads(Batch(*[tensor.double() for tensor in batch[:4]], batch.cu_seqlens))
    assert triton_on_cpu == []


@pytest.mark.parametrize("lengths", [(2, 0, 4), ()], ids=["items", "no-user"])
def test_opcheck(lengths: tuple[int, ...], device: torch.device) -> None:
    batch = _batch(device, lengths=lengths)
    leaves = batch.leaves()
    torch.library.opcheck(torch.ops.laser_fast.route_experts.default, (*leaves[:3], batch.cu_seqlens, 2, "softmax"))
    expert = torch.arange(2, device=device).int().expand(len(lengths), 2).contiguous()
    torch.library.opcheck(torch.ops.laser_fast.dispatch_queries.default, (leaves[3], expert))
    outputs = torch.randn(2 * len(lengths), 3, 5, device=device, requires_grad=True)
    weight = torch.rand(len(lengths), 2, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.laser_fast.combine_queries.default, (outputs, weight))


@pytest.mark.parametrize("flags", [(False, True), (True, False), (False, False)], ids=["second", "first", "neither"])
def test_fakes_of_the_backward_operations(flags: tuple[bool, bool], device: torch.device) -> None:
    batch = _batch(device)
    arguments = (*batch[:3], batch.cu_seqlens, 3, "softmax")
    weight, pooled, balance, *rest = torch.ops.laser_fast.route_experts(*arguments)
    expert, load, probabilities = rest
    saved = (batch.states, batch.router, batch.cu_seqlens, expert, weight, pooled, load, probabilities)
    operation = torch.ops.laser_fast.route_experts_backward.default
    given = (weight, pooled, balance, *saved, "softmax", *flags)
    torch.library.opcheck(operation, given, test_utils=("test_schema", "test_faketensor"))
    outputs, grad = (torch.randn(slabs, 3, 5, device=device) for slabs in (expert.numel(), expert.shape[0]))
    operation = torch.ops.laser_fast.combine_queries_backward.default
    torch.library.opcheck(operation, (grad, outputs, weight, *flags), test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_break(device: torch.device) -> None:
    batch = _batch(device)
    leaves = batch.leaves()
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(leaves, batch.cu_seqlens), _loss(leaves, batch.cu_seqlens)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_autocast_changes_nothing(device: torch.device) -> None:
    batch = _batch(device)
    expected = _grads(batch)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = _grads(batch)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("needed", range(4), ids=NAMES)
def test_unneeded_gradients_stay_none(needed: int, device: torch.device) -> None:
    batch = _batch(device)
    expected = _grads(batch)[needed]
    tensors = [tensor.detach().clone() for tensor in batch[:4]]
    tensors[needed].requires_grad_()
    _loss(tensors, batch.cu_seqlens).backward()
    assert [tensor.grad is not None for tensor in tensors] == [index == needed for index in range(4)]
    assert torch.equal(tensors[needed].grad, expected)


def test_checkpointing_gives_bitwise_the_same_gradients(device: torch.device) -> None:
    batch = _batch(device, torch.float16)
    leaves = batch.leaves()
    loss = checkpoint(lambda *tensors: _loss(list(tensors), batch.cu_seqlens), *leaves, use_reentrant=False)
    actual = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(one, other) for one, other in zip(actual, _grads(batch), strict=True))


def test_backward_twice_and_two_runs_are_bit_equal(device: torch.device) -> None:
    batch = _batch(device)
    leaves = batch.leaves()
    loss = _loss(leaves, batch.cu_seqlens)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    for one, two, three in zip(first, second, _grads(batch), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_nothing_is_read_back_from_the_device(inner_operations: type) -> None:
    with inner_operations() as seen:
        _grads(_batch(torch.device("cpu")))
    operations = {name for name in seen.names if name.startswith("laser_fast")}
    assert len(operations) == 6 and "aten::bucketize" in seen.names
    assert seen.readbacks == []


def _train(device: torch.device, steps: int = 8) -> list[float]:
    """Losses of a small M-Former that learns to write given prefixes."""
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 4, "top_k": 2, "num_queries": 2}
    model = MFormer(6, 8, **sizes, dropout=0.0, prefix_rms=1.0).to(device)
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(12, 6, generator=generator).to(device)
    target = torch.randn(4, 2, 8, generator=generator).to(device)
    cu_seqlens = torch.tensor([0, 5, 5, 6, 12], dtype=torch.int32, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        output = model(states, cu_seqlens)
        loss = (output.prefix - target).square().mean() + 0.01 * output.routing.balance_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _assert_same_course(actual: list[float], expected: list[float]) -> None:
    # float32 sums in another order, through 8 updates that divide by the gradients' size: a few hundred eps
    assert actual == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.8 * expected[0]


def test_training_runs_as_with_the_references(request: pytest.FixtureRequest) -> None:
    expected = _train(torch.device("cpu"))
    served = request.getfixturevalue("triton_on_cpu")
    _assert_same_course(_train(torch.device("cpu")), expected)
    assert served.count("route_experts") == served.count("combine_queries") == 16


@pytest.mark.gpu
def test_training_on_a_gpu_runs_as_with_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    from laser_fast.ops import dispatch, routing

    actual = _train(torch.device("cuda"))
    for module in (routing, dispatch):
        monkeypatch.setattr(module, "triton_serves", lambda *_, **__: False)
    _assert_same_course(actual, _train(torch.device("cuda")))


def _step(leaves: list[Tensor], cu_seqlens: Tensor) -> list[Tensor]:
    loss = _loss(leaves, cu_seqlens)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.gpu
def test_a_captured_graph_replays_with_changed_inputs() -> None:
    batch = _batch(torch.device("cuda"))
    leaves, cu_seqlens = batch.leaves(), batch.cu_seqlens.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles the kernels and fills the allocator's pool
            _step(leaves, cu_seqlens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _step(leaves, cu_seqlens)
    generator = torch.Generator().manual_seed(41)
    for lengths in ((5, 0, 20, 1), (26, 0, 0, 0), (1, 2, 3, 20)):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn(leaf.shape, generator=generator))
        cu_seqlens.copy_(torch.tensor([0, *lengths]).cumsum(0))
        graph.replay()
        expected = _step(leaves, cu_seqlens)
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True)), lengths


@pytest.mark.gpu
def test_the_host_never_waits_for_the_device() -> None:
    batch = _batch(torch.device("cuda"), torch.bfloat16)
    _step(batch.leaves(), batch.cu_seqlens)  # compiles the kernels
    leaves = batch.leaves()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = _step(leaves, batch.cu_seqlens)  # raises where the host waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(result.isfinite().all()) for result in results)
