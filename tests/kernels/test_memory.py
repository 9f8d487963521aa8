"""What the kernels touch: nothing outside their results, every input as often as promised, and all of large tensors."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from laser_fast.kernels import dispatch, routing, routing_backward
from laser_fast.kernels.routing import route_forward
from laser_fast.kernels.routing_backward import route_backward

Make = Callable[..., Any]
BOTH = {"weighting": "softmax", "needs": (True, True)}


def _grads(result: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(result.weight), torch.zeros_like(result.pooled), torch.ones_like(result.balance_loss)


def test_the_guards_see_a_store_beside_the_result(device: torch.device, guarded_memory: type) -> None:
    memory = guarded_memory()
    with memory:
        result = torch.zeros(3, device=device).new_empty(4)
    memory.assert_untouched()
    result.as_strided((1,), (1,), result.storage_offset() + 4).zero_()
    with pytest.raises(AssertionError):
        memory.assert_untouched()


class Traffic:
    """How often the interpreter reads and writes each element of a tensor."""

    def __init__(self, interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        builder = interpreter.InterpreterBuilder
        self.calls: dict[str, list[Any]] = {"load": [], "store": []}
        load, store = builder.create_masked_load, builder.create_masked_store

        # loads and stores without a mask arrive here too, with one that is true everywhere
        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.calls["load"].append(pointers.data[mask.data])
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.calls["store"].append(np.broadcast_to(pointers.data, mask.data.shape)[mask.data])
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)

    def counts(self, kind: str, tensor: Tensor) -> list[int]:
        """Sorted distinct counts of the elements of a contiguous tensor."""
        addresses = np.concatenate([call.reshape(-1) for call in self.calls[kind]]).astype(np.int64)
        places = (addresses - tensor.data_ptr()) // tensor.element_size()
        places = places[(places >= 0) & (places < tensor.numel())]
        return sorted(set(np.bincount(places, minlength=tensor.numel()).tolist()))

    def clear(self) -> None:
        for calls in self.calls.values():
            calls.clear()


@pytest.fixture
def traffic(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> Traffic:
    return Traffic(interpreter, monkeypatch)


@pytest.mark.parametrize("small_batch", [0, 16384], ids=["large-tile", "small-tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_routing_reads_the_states_once_forward_and_once_backward(
    dtype: torch.dtype,
    small_batch: int,
    traffic: Traffic,
    routing_inputs: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "SMALL_BATCH", small_batch)
    for module, name in ((routing, "_PROGRAMS"), (routing_backward, "_RANGES")):
        monkeypatch.setattr(module, name, 1)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 2)
    inputs = routing_inputs((100, 0, 37, 1), 150, 8, 3, dtype)
    result = route_forward(*inputs, "softmax")
    assert traffic.counts("load", inputs.states) == [1]
    assert traffic.counts("store", inputs.states) == [0]
    for tensor in result:
        assert traffic.counts("store", tensor) == [1]

    traffic.clear()
    arguments = inputs.states, inputs.router, inputs.cu_seqlens, result
    grads = route_backward(_grads(result), *arguments, **BOTH)
    assert traffic.counts("load", inputs.states) == [1]
    for tensor in grads:
        assert traffic.counts("store", tensor) == [1]

    traffic.clear()
    route_backward(_grads(result), *arguments, weighting="softmax", needs=(True, False))
    assert traffic.counts("load", inputs.states) == [0]


def test_dispatch_and_combine_move_each_slab_once(traffic: Traffic, device: torch.device) -> None:
    expert = torch.tensor([[1, 0], [4, 2], [3, 1]], dtype=torch.int32)
    outputs, weight, queries = torch.randn(6, 25, 41), torch.rand(3, 2), torch.randn(5, 25, 41)
    dispatched = dispatch.dispatch_forward(queries, expert)
    assert traffic.counts("load", queries) == [1, 2]  # expert 1 serves two users
    assert traffic.counts("store", dispatched) == [1]
    traffic.clear()
    summed = dispatch.dispatch_backward(outputs, expert, 5)
    assert traffic.counts("load", outputs) == traffic.counts("store", summed) == [1]
    traffic.clear()
    combined = dispatch.combine_forward(outputs, weight)
    assert traffic.counts("load", outputs) == traffic.counts("store", combined) == [1]
    traffic.clear()
    grad = torch.randn(3, 25, 41)
    grads = dispatch.combine_backward(grad, outputs, weight, needs_outputs=True, needs_weight=True)
    assert traffic.counts("load", outputs) == [1]
    assert traffic.counts("load", grad) == [2]  # once for either choice
    assert [traffic.counts("store", tensor) for tensor in grads] == [[1], [1]]


_ROW = 1 << 30  # elements between rows: the third row starts at 2^31


@pytest.fixture
def far_rows() -> Callable[[Tensor], Tensor]:
    """Copy four rows of float16 to memory where they lie 2^30 elements apart, and no page is there until it is touched.

    They start 2^31 elements into that memory, so that an offset that wraps at 32 bits still meets zeros inside of it.
    """
    size = 2 * (2 * _ROW + 4 * _ROW)

    def place(rows: Tensor) -> Tensor:
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            memory = mmap.mmap(-1, size, flags=flags)
        except (OSError, ValueError) as error:
            pytest.skip(f"{size >> 30} GiB of address space are not to be had: {error}")
        buffer = torch.frombuffer(memory, dtype=torch.float16)
        return buffer.as_strided((4, rows.shape[1]), (_ROW, 1), 2 * _ROW).copy_(rows)

    return place


def _typed_range(*bounds: Any) -> Iterator[Any]:
    """`range` as the compiler has it: the variable is as wide as its bounds. The interpreter makes it a plain int."""
    for value in range(*[int(bound) for bound in bounds]):
        yield value + sum(0 * bound for bound in bounds)


def test_rows_further_apart_than_32_bits_count(
    interpreter: Any,
    far_rows: Callable[[Tensor], Tensor],
    routing_inputs: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "range", _typed_range, raising=False)
    monkeypatch.setattr(routing_backward, "range", _typed_range, raising=False)
    inputs = routing_inputs((1, 3), 33, 7, 3, torch.float16)
    far = far_rows(inputs.states)
    expected = route_forward(*inputs, "softmax")
    result = route_forward(far, *inputs[1:], "softmax")
    assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
    grads, arguments = _grads(expected), (inputs.router, inputs.cu_seqlens, expected)
    actual = route_backward(grads, far, *arguments, **BOTH)
    expected_grads = route_backward(grads, inputs.states, *arguments, **BOTH)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected_grads, strict=True))


def test_slabs_further_apart_than_32_bits_count(interpreter: Any, far_rows: Callable[[Tensor], Tensor]) -> None:
    slabs = torch.arange(1, 4 * 64 + 1).view(4, 64).half()
    far, out = far_rows(slabs), far_rows(torch.zeros(4, 64))
    expert, weight = torch.tensor([3, 2, 1, 0], dtype=torch.int32), torch.ones(4, 1)
    # one block of every slab of 2^30 numbers
    dispatch._dispatch_kernel[(4,)](far, expert, out, _ROW, 1, BLOCK=64)
    assert torch.equal(out, slabs.flip(0))
    dispatch._combine_kernel[(4,)](far, weight, out, _ROW, 1, TOP_K=1, BLOCK=64)
    assert torch.equal(out, slabs)
    sizes = {"NUM_EXPERTS": 4, "BLOCK_R": 16, "BLOCK_C": 64, "BLOCK_E": 16}
    dispatch._dispatch_backward_kernel[(1,)](far, expert, out, 4, _ROW, **sizes)
    assert torch.equal(out, slabs.flip(0))


def _needs_memory(device: torch.device, gibibytes: int) -> None:
    free = torch.cuda.mem_get_info(device)[0]
    if free < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, got {free >> 30}")


@pytest.mark.gpu
@pytest.mark.slow
def test_routing_of_more_elements_than_32_bits_count(device: torch.device) -> None:
    _needs_memory(device, 16)
    num_items, width, tail = 2_900_000, 768, 4096
    assert (num_items - tail) * width > 1 << 31
    generator = torch.Generator(device).manual_seed(29)
    states = torch.randn(num_items, width, dtype=torch.float16, device=device, generator=generator)
    router = torch.randn(8, width, device=device, generator=generator) / width**0.5
    bias = torch.zeros(8, device=device)
    ends = torch.tensor([0, num_items - tail, num_items - tail + 1000, num_items], dtype=torch.int32, device=device)
    result = route_forward(states, router, bias, ends, 3, "softmax")
    last, last_ends = states[-tail:], (ends[1:] - (num_items - tail)).contiguous()
    expected = route_forward(last, router, bias, last_ends, 3, "softmax")
    # the tile differs, and with it the order of sums over 768 products
    for name in ("weight", "pooled"):
        torch.testing.assert_close(getattr(result, name)[1:], getattr(expected, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.probability[-tail:], expected.probability, rtol=1e-4, atol=1e-6)
    balance = torch.zeros_like(result.balance_loss)  # which alone joins the users
    ones = torch.ones_like(result.weight).cumsum(dim=1)
    grad_states, grad_router, _ = route_backward(
        (ones, torch.zeros_like(result.pooled), balance), states, router, ends, result, **BOTH
    )
    kept = expected._replace(**{name: getattr(result, name)[1:] for name in ("weight", "pooled", "expert")})
    kept = kept._replace(probability=result.probability[-tail:].contiguous(), load=result.load)
    expected_states, _, _ = route_backward(
        (ones[1:], torch.zeros_like(kept.pooled), balance), last, router, last_ends, kept, **BOTH
    )
    assert torch.equal(grad_states[-tail:], expected_states)
    assert grad_router.isfinite().all()


@pytest.mark.gpu
@pytest.mark.slow
def test_dispatch_and_combine_of_more_elements_than_32_bits_count(device: torch.device) -> None:
    _needs_memory(device, 32)
    users, slab, tail = 30_000, (32, 768), 100
    assert 3 * (users - tail) * 32 * 768 > 1 << 31
    generator = torch.Generator(device).manual_seed(31)
    queries = torch.randn(8, *slab, dtype=torch.float16, device=device, generator=generator)
    expert = torch.rand(users, 8, device=device, generator=generator).argsort(dim=1)[:, :3].int()
    weight = torch.rand(users, 3, device=device, generator=generator)
    outputs = dispatch.dispatch_forward(queries, expert)
    assert torch.equal(outputs[-3 * tail :], dispatch.dispatch_forward(queries, expert[-tail:]))
    combined = dispatch.combine_forward(outputs, weight)
    assert torch.equal(combined[-tail:], dispatch.combine_forward(outputs[-3 * tail :], weight[-tail:]))
    needs = {"needs_outputs": True, "needs_weight": True}
    grads = dispatch.combine_backward(combined, outputs, weight, **needs)
    last = dispatch.combine_backward(combined[-tail:], outputs[-3 * tail :], weight[-tail:], **needs)
    assert torch.equal(grads[0][-3 * tail :], last[0])
    assert torch.equal(grads[1][-tail:], last[1])
    del grads, combined
    # only the last users' slabs count, so the sum over all is theirs
    outputs[: -3 * tail] = 0
    summed = dispatch.dispatch_backward(outputs, expert, 8)
    expected = torch.zeros_like(summed, dtype=torch.float64)
    expected.index_add_(0, expert[-tail:].flatten().long(), outputs[-3 * tail :].double())
    torch.testing.assert_close(summed.double(), expected, rtol=1e-3, atol=1e-3)
