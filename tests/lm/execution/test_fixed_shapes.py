"""Batches filled up to few shapes: the same results, few shapes, and recordings that are bounded and never outdated."""

import pytest
import torch
from torch import Tensor

from laser_fast.lm.execution.cuda_graphs import Recorder, Run
from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.execution.fixed_shapes import FixedShape, FixedShapes, filled_offsets, fixed_shape
from laser_fast.lm.frozen_lm import FrozenLM

from ..families import random_model
from ..packed import assert_close, packed_inputs, random_prefix

BATCHES = [[20], [7, 1, 23, 18, 40], [64, 64], [3] * 17]


def build(name: str, execution: Execution | None = None) -> FrozenLM:
    return FrozenLM(random_model(name, max_position_embeddings=96), execution)


@torch.no_grad()
@pytest.mark.parametrize("last_only", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("prefix", ["none", "shared", "own", "pool"])
@pytest.mark.parametrize("name", ["llama", "bert", "gemma2", "gpt_oss"])
def test_filled_batches_give_what_the_batches_alone_give(name: str, prefix: str, last_only: bool) -> None:
    lm = build(name)
    recorded = FixedShapes(lm, Recorder())
    for lengths in (*BATCHES, *BATCHES):  # the second time from recordings that hold other batches
        embeds, cu_seqlens = packed_inputs(lengths, seed=recorded.num_captures)
        size = len(lengths)
        slots = torch.randint(0, 3, (size,), dtype=torch.int32, generator=torch.Generator().manual_seed(size))
        sizes = {"shared": 1, "own": size, "pool": 3}
        injected = None
        if prefix != "none":
            injected = random_prefix(lm, sizes[prefix], slots=slots if prefix == "pool" else None)[0]
        expected = lm(embeds, cu_seqlens, injected, last_only=last_only)
        actual = recorded(embeds, cu_seqlens, injected, last_only=last_only)
        assert actual is not None
        assert_close(actual, expected)


@torch.no_grad()
def test_with_the_whole_last_layer() -> None:
    lm = build("llama", Execution(last_layer="all", fused=False))
    embeds, cu_seqlens = packed_inputs([7, 12])
    actual = FixedShapes(lm, Recorder())(embeds, cu_seqlens, None, last_only=True)
    assert actual is not None
    assert_close(actual, lm(embeds, cu_seqlens, last_only=True))


@torch.no_grad()
def test_one_recording_serves_every_batch_of_its_shape_and_of_either_kind_of_tensor() -> None:
    lm = build("llama")

    class SameOutput(Recorder):
        def record(self, run: Run) -> Run:
            output = run().clone()
            return lambda: output.copy_(run())  # as a graph

    lm.fixed_shapes = FixedShapes(lm, SameOutput())
    kept: list[tuple[Tensor, Tensor]] = []
    for seed, lengths in enumerate([[20, 31, 9], [33, 5, 18, 2], [28, 30, 3]]):
        embeds, cu_seqlens = packed_inputs(lengths, seed=seed)
        with torch.inference_mode() if seed == 0 else torch.no_grad():
            actual = lm(embeds + 0, cu_seqlens, last_only=True)
        with torch.enable_grad():  # the plain path
            kept.append((actual, lm(embeds, cu_seqlens, last_only=True)))
    assert lm.fixed_shapes.num_captures == 1
    for actual, expected in kept:  # later calls wrote into the same tensors
        assert_close(actual, expected)


def test_calls_with_gradient_are_never_recorded() -> None:
    lm = build("llama")
    lm.fixed_shapes = FixedShapes(lm, Recorder())
    embeds, cu_seqlens = packed_inputs([9, 4])
    lm(embeds.requires_grad_(), cu_seqlens).sum().backward()
    assert embeds.grad is not None and not len(lm.fixed_shapes)
    with torch.no_grad():
        lm(embeds, cu_seqlens)
    assert len(lm.fixed_shapes) == 1


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "another tensor", "data"])
def test_a_changed_weight_drops_all_recordings(change: str) -> None:
    lm = build("llama")
    recorded = FixedShapes(lm, Recorder())
    embeds, cu_seqlens = packed_inputs([9, 4])
    recorded(embeds, cu_seqlens, None, last_only=False)
    linear = lm.model.layers[1].mlp.down_proj
    if change == "in place":
        linear.weight.mul_(2.0)
    elif change == "data":
        linear.weight.data = linear.weight.data * 2.0
    else:
        linear.weight = torch.nn.Parameter(linear.weight * 2.0, requires_grad=False)
    actual = recorded(embeds, cu_seqlens, None, last_only=False)
    assert actual is not None and recorded.num_captures == 2 and len(recorded) == 1
    assert_close(actual, lm(embeds, cu_seqlens))


@torch.no_grad()
def test_the_recording_unused_for_longest_is_dropped() -> None:
    recorded = FixedShapes(build("bert"), Recorder(), capacity=2)
    for lengths in ([10], [90], [10], [10, 10]):  # the last takes the place of the second
        recorded(*packed_inputs(lengths), None, last_only=False)
    assert len(recorded) == 2 and recorded.num_captures == 3
    recorded(*packed_inputs([10]), None, last_only=False)
    assert recorded.num_captures == 3
    recorded(*packed_inputs([90]), None, last_only=False)
    assert recorded.num_captures == 4


@torch.no_grad()
def test_what_is_too_large_or_empty_is_left_to_the_plain_path() -> None:
    lm = build("bert")
    recorded = FixedShapes(lm, Recorder(), max_tokens=100)
    assert recorded(*packed_inputs([50, 51]), None, last_only=False) is None
    assert recorded(*packed_inputs([50, 49]), None, last_only=False) is None  # fills up to 112
    assert recorded(torch.zeros(0, 32), torch.zeros(3, dtype=torch.int32), None, last_only=False) is None
    assert recorded(torch.zeros(0, 32), torch.zeros(1, dtype=torch.int32), None, last_only=False) is None
    with pytest.raises(ValueError, match="at most 96 tokens with its prefix and suffix, got 97"):
        recorded(*packed_inputs([92]), random_prefix(lm, 1)[0], last_only=False)
    assert recorded(*packed_inputs([91]), random_prefix(lm, 1)[0], last_only=False) is not None


@torch.no_grad()
@pytest.mark.parametrize("offsets", [[0, 20, 60], [0, 20], [1, 20, 51], [0, 60, 51]], ids=str)
def test_offsets_and_slots_that_point_outside_are_refused_on_both_paths(offsets: list[int]) -> None:
    lm = build("llama")
    embeds, cu_seqlens = packed_inputs([20, 31])
    pool = random_prefix(lm, 3, slots=torch.tensor([0, 3], dtype=torch.int32))[0]
    for run in (lm, FixedShapes(lm, Recorder())):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            run(embeds, torch.tensor(offsets, dtype=torch.int32), None, last_only=True)
        with pytest.raises(ValueError, match=r"(prefix.slots|prefix_index) must be between 0 and 2, got 3"):
            run(embeds, cu_seqlens, pool, last_only=True)


@torch.no_grad()
def test_prepared_shapes_are_captured_before_they_are_needed() -> None:
    lm = build("llama")
    recorded = FixedShapes(lm, Recorder())
    prefix = random_prefix(lm, 1)[0]
    recorded.prepare([(1, n) for n in range(1, 200)], lambda: recorded(*packed_inputs([4]), prefix, last_only=True))
    before = recorded.num_captures
    for tokens in range(1, 92):
        assert recorded(*packed_inputs([tokens]), prefix, last_only=True) is not None
    assert recorded.num_captures == before == len(recorded) <= 6


@torch.no_grad()
def test_more_shapes_than_are_kept_are_refused() -> None:
    recorded = FixedShapes(build("llama"), Recorder(), capacity=2)
    with pytest.raises(ValueError, match="shapes must be at most capacity = 2, got 3"):
        recorded.prepare([(n, 8) for n in (1, 2, 4)], lambda: recorded(*packed_inputs([4]), None, last_only=True))


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity and max_tokens must be at least 1, got 0 and 2048"):
        FixedShapes(build("bert"), Recorder(), capacity=0)


def test_shapes_are_few_and_waste_little() -> None:
    shapes, waste = set(), []
    for length in range(20, 1025, 3):
        shape = fixed_shape(length, 1, length)
        assert shape.tokens > length and shape.sequences == 2 and shape.longest >= length
        shapes.add(shape.tokens)
        waste.append(shape.tokens / length - 1)
    assert len(shapes) == 17  # 64, and four for each doubling up to 1024
    waste = [share for length, share in zip(range(20, 1025, 3), waste, strict=True) if length >= 64]
    assert max(waste) < 0.26 and sum(waste) / len(waste) < 0.12


@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("lengths", [[1], [40] * 3, [1] * 64, [40] * 9, [37] * 129])
def test_the_sequences_behind_are_not_empty_and_not_too_long(lengths: list[int], limit: int | None) -> None:
    shape = fixed_shape(sum(lengths), len(lengths), max(lengths), limit)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    filled = filled_offsets(cu_seqlens, sum(lengths), shape)
    assert filled.dtype == torch.int32 and filled.shape == (shape.sequences + 1,) and int(filled[-1]) == shape.tokens
    assert torch.equal(filled[: len(lengths) + 1], cu_seqlens)
    behind = filled[len(lengths) :].diff()
    assert len(behind) >= 1 and int(behind.min()) >= 1 and int(behind.max()) <= shape.longest <= (limit or 64)


def test_a_shape_grows_by_sequences_where_one_could_not_hold_what_is_left() -> None:
    assert fixed_shape(33, 1, 33) == FixedShape(64, 2, 64)
    assert fixed_shape(4 * 129, 4, 129, 129) == FixedShape(640, 5, 129)
    assert fixed_shape(16 * 129, 16, 129, 129) == FixedShape(2560, 33, 129)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_graphs_give_what_the_plain_path_gives_in_memory_that_does_not_grow(name: str) -> None:
    lm = build(name).to("cuda", torch.bfloat16)
    plain, graphs = build(name).to("cuda", torch.bfloat16), FixedShapes(lm, capacity=4)
    lm.fixed_shapes = graphs
    generator = torch.Generator().manual_seed(0)

    def compare(seed: int) -> None:
        lengths = torch.randint(1, 90, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
        embeds, cu_seqlens = (tensor.cuda() for tensor in packed_inputs(lengths.tolist(), seed=seed))
        with torch.inference_mode():
            actual, expected = (model(embeds, cu_seqlens, last_only=True).float() for model in (lm, plain))
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))

    for seed in range(20):
        compare(seed)
    for _ in range(2):  # every shape that the batches have was captured and dropped at least once
        reserved = torch.cuda.memory_reserved()
        for seed in range(100):
            compare(seed)
    assert torch.cuda.memory_reserved() <= reserved * 1.05 + 2**21
    assert len(graphs) <= 4


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_is_dropped_with_its_weights() -> None:
    lm = build("llama").to("cuda", torch.bfloat16)
    lm.fixed_shapes = FixedShapes(lm)
    embeds, cu_seqlens = (tensor.cuda() for tensor in packed_inputs([9, 4]))
    before = lm(embeds, cu_seqlens)
    for parameter in lm.model.layers[1].mlp.parameters():
        parameter.data = parameter.data * 2.0
    after = lm(embeds, cu_seqlens)
    with torch.enable_grad():
        torch.testing.assert_close(after, lm(embeds, cu_seqlens), rtol=2e-2, atol=2e-2)
    assert lm.fixed_shapes.num_captures == 2 and not torch.allclose(before, after, atol=1e-2)
