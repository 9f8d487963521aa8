"""Prefix injection on a GPU: against the references on the CPU, in graphs, past 2^31 elements, and with bad offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laser_fast.ops import backends, inject_prefix_kv, inject_prefix_kv_reference

from .prefix_kv_cases import (
    Inputs,
    compiled_function,
    dtype_cases,
    kind_cases,
    lengths_cases,
    make_inputs,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _compiled_code_runs() -> None:
    assert backends.cuda_absence(0) == ""  # else the references would be tested against themselves


def inject(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inject_prefix_kv(*inputs[:5], prefix_index=inputs.prefix_index)


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs[0].double().square().sum() + outputs[1].double().sin().sum(), leaves)


@dtype_cases
@kind_cases
@lengths_cases
def test_copies_and_sums_equal_the_cpu_bit_by_bit(lengths: list[int], kind: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(lengths, 3, kind, dtype)
    on_gpu = inputs.on("cuda")
    for tensor in (*inputs.leaves, *on_gpu.leaves):
        tensor.requires_grad_()
    expected, actual = inject(inputs), inject(on_gpu)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other)
    layout = inputs.cu_seqlens, inputs.prefix_index, list(inputs.prefix_key.shape[:2]), [True] * 4
    grads = [torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(3)).to(dtype) for _ in range(2)]
    sums = torch.ops.laser_fast.inject_prefix_kv_backward(*grads, *layout)
    moved = [grad.cuda() for grad in grads]
    layout = on_gpu.cu_seqlens, on_gpu.prefix_index, *layout[2:]
    for one, other in zip(torch.ops.laser_fast.inject_prefix_kv_backward(*moved, *layout), sums, strict=True):
        assert torch.equal(one.cpu(), other)  # the same parts of a sum in the same order


@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (1, 8), (5, 72), (8, 128)], ids=str)
@kind_cases
def test_every_alignment(heads: tuple[int, int], kind: str) -> None:
    for dtype in (torch.float16, torch.float32):
        inputs = make_inputs([3, 0, 9], 2, kind, dtype, heads).on("cuda")
        expected = inject_prefix_kv_reference(*inputs[:5], prefix_index=inputs.prefix_index)
        assert all(torch.equal(a, b) for a, b in zip(inject(inputs), expected, strict=True))
        # one element into its storage: no longer a multiple of 16 bytes
        shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in inputs.leaves]
        actual = inject_prefix_kv(*shifted, inputs.cu_seqlens, prefix_index=inputs.prefix_index)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_nothing_is_written_outside() -> None:
    function = compiled_function("inject_prefix_kv_cuda")
    for width in (1, 2, 3, 8):
        inputs = make_inputs([3, 0, 9], 2, "per-sequence", torch.float16).on("cuda")
        tensors = [tensor[..., :width].contiguous() for tensor in inputs.leaves]
        guarded = [torch.full((18 + 8, 2, width), 7.0, dtype=torch.float16, device="cuda") for _ in range(2)]
        offsets = torch.full((4,), 7, dtype=torch.int32, device="cuda")
        function(*tensors, inputs.cu_seqlens, None, *(tensor[4:-4] for tensor in guarded), offsets)
        expected = inject_prefix_kv_reference(*tensors, inputs.cu_seqlens)
        for tensor, exact in zip(guarded, expected[:2], strict=True):
            assert torch.equal(tensor[4:-4], exact)
            assert (tensor[:4] == 7).all()
            assert (tensor[-4:] == 7).all()


def test_bad_offsets_and_slots_cost_rows_but_no_stray_access() -> None:
    inputs = make_inputs([3, 2], 2, "pool").on("cuda")
    outside = inputs._replace(prefix_index=torch.tensor([-1, 5], dtype=torch.int32, device="cuda"))
    key, _, _ = inject(outside)
    assert (key[[0, 1, 5, 6]] == 0).all()
    assert torch.equal(key[2:5], inputs.key[:3])
    grads = torch.ones_like(key), torch.ones_like(key)
    sums = torch.ops.laser_fast.inject_prefix_kv_backward(*grads, *outside[4:], [5, 2], [True] * 4)
    assert (sums[2] == 0).all()
    for offsets in ([-5, 9, 5], [9, 0, 5], [0, 100, 5], [2**31 - 1, -(2**31), 0]):
        bad = inputs._replace(cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device="cuda"))
        inject(bad)
        torch.ops.laser_fast.inject_prefix_kv_backward(*grads, *bad[4:], [5, 2], [True] * 4)
    torch.cuda.synchronize()  # an illegal address would surface here


@kind_cases
def test_sums_are_bit_equal_from_run_to_run(kind: str) -> None:
    inputs = make_inputs([(5 * b) % 70 for b in range(64)], 32, kind, torch.bfloat16, (8, 128)).on("cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    once = gradients(inject(inputs), leaves)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(gradients(inject(inputs), leaves), once, strict=True))


@kind_cases
def test_a_cuda_graph_replays_forward_and_backward(kind: str) -> None:
    inputs = make_inputs([30, 0, 2, 17], 3, kind).on("cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(inject(inputs), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = inject(inputs)
        grads = gradients(outputs, leaves)
    with torch.no_grad():
        for tensor in leaves:
            tensor.mul_(2)
        # other lengths of the same sum: the graph reads them anew
        inputs.cu_seqlens.copy_(torch.tensor([0, 1, 20, 20, 49], dtype=torch.int32))
    graph.replay()
    expected = inject(inputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, gradients(expected, leaves), strict=True))


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    heads, size, length = 32, 128, 32
    num_tokens = 2**31 // (heads * size) + 4096
    if torch.cuda.mem_get_info()[0] < 8 * num_tokens * heads * size * 2:
        pytest.skip("needs 40 GB of free GPU memory")
    key = torch.randint(-100, 100, (num_tokens, heads, size), dtype=torch.int8, device="cuda").half()
    prefix = torch.randn(2, length, heads, size, device="cuda").half()
    cu_seqlens = torch.tensor([0, num_tokens - 5, num_tokens], dtype=torch.int32, device="cuda")
    out, _, _ = inject_prefix_kv(key, key, prefix, prefix, cu_seqlens)
    assert out.numel() > 2**31
    assert torch.equal(out[:length], prefix[0])
    assert torch.equal(out[length : num_tokens - 5 + length], key[:-5])
    assert torch.equal(out[-5 - length : -5], prefix[1])
    assert torch.equal(out[-5:], key[-5:])
    layout = cu_seqlens, None, [2, length], [True, False, True, False]
    text, _, of_prefix, _ = torch.ops.laser_fast.inject_prefix_kv_backward(out, None, *layout)
    assert torch.equal(text, key)
    assert torch.equal(of_prefix, prefix)
    del text
    shared, _, of_shared, _ = torch.ops.laser_fast.inject_prefix_kv_backward(
        out, None, cu_seqlens, None, [1, length], [False, False, True, False]
    )
    assert len(shared) == 0
    assert torch.equal(of_shared[0], (prefix[0].float() + prefix[1].float()).half())
