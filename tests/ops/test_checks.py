"""What tensors hold is looked at before it is used: on the host where it can, on the device else, without waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from laser_fast.ops import (
    ItemLists,
    catalog_cross_entropy,
    catalog_topk,
    cu_seqlens_from_lengths,
    dispatch_queries,
    inject_prefix_kv,
    route_experts,
    segment_ids,
    segment_mean,
    segment_positions,
    segment_sum,
)
from laser_fast.ops.checks import hold_on_device, host_numbers, remember_indices, validate_indices
from laser_fast.ops.host_copies import remember_on_host
from laser_fast.ops.segments import even_cu_seqlens, lengthened_cu_seqlens, lengths_on_host, validate_cu_seqlens


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


class OnDevice(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


ROWS = torch.ones(3, 2)
HEADS = torch.ones(3, 1, 2)
TAKE_OFFSETS: dict[str, Callable[[Tensor], object]] = {
    "segment_sum": lambda offsets: segment_sum(ROWS, offsets),
    "segment_mean": lambda offsets: segment_mean(ROWS, offsets),
    "segment_ids": lambda offsets: segment_ids(offsets, 3),
    "segment_positions": lambda offsets: segment_positions(offsets, 3),
    "route_experts": lambda offsets: route_experts(ROWS, torch.ones(4, 2), torch.zeros(4), offsets, 2),
    "inject_prefix_kv": lambda offsets: inject_prefix_kv(HEADS, HEADS, HEADS[None], HEADS[None], offsets),
    "catalog_topk": lambda offsets: catalog_topk(ROWS[:2], ROWS, 1, exclude=ItemLists(torch.zeros(3).long(), offsets)),
}
BAD = {
    "beyond": (int32(0, 3, 9), "end at"),
    "far beyond": (int32(0, 3, 10**6), "end at"),
    "left over": (int32(0, 1, 2), "end at"),
    "shifted": (int32(1, 2, 3), "start at 0, got 1"),
    "negative": (int32(0, -1, 3), "not decrease, got 0"),
    "decreasing": (int32(0, 5, 3), "not decrease, got 5"),
}


@pytest.mark.parametrize("function", TAKE_OFFSETS)
@pytest.mark.parametrize("fault", BAD)
def test_offsets_that_do_not_fit_are_refused_by_name(function: str, fault: str) -> None:
    offsets, message = BAD[fault]
    with pytest.raises(ValueError, match=f"^{function}: .*cu_seqlens must {message}"):
        TAKE_OFFSETS[function](offsets)
    TAKE_OFFSETS[function](int32(0, 1, 3))


def test_indices_that_point_outside_are_refused_by_name() -> None:
    experts = int32(0, 1, 2, 4).view(2, 2)
    with pytest.raises(ValueError, match=r"dispatch_queries: expert must be between 0 and 3, got 4 at position 1, 1"):
        dispatch_queries(torch.ones(4, 1, 1), experts)
    with pytest.raises(
        ValueError, match=r"catalog_cross_entropy: target must be between 0 and 2, got -1 at position 1"
    ):
        catalog_cross_entropy(ROWS[:2], ROWS, torch.tensor([0, -1]), temperature=1.0)


def test_sums_that_do_not_fit_in_int32_are_refused() -> None:
    most = 2**31 - 1
    assert cu_seqlens_from_lengths(torch.tensor([most])).tolist() == [0, most]
    with pytest.raises(
        ValueError, match=f"cu_seqlens_from_lengths: lengths must sum to at most {most}, got {most + 1}"
    ):
        cu_seqlens_from_lengths(torch.tensor([most, 1]))
    for wrong in (-1, 2**31, 2**62):
        with pytest.raises(ValueError, match=f"lengths must be between 0 and {most}, got {wrong} at position 0"):
            cu_seqlens_from_lengths(torch.tensor([wrong, 1]))
    assert even_cu_seqlens(1, most, torch.device("cpu"))[-1] == most
    with pytest.raises(ValueError, match=f"even_cu_seqlens: offsets must fit in int32, got {2 * most}"):
        even_cu_seqlens(2, most, torch.device("cpu"))
    with pytest.raises(ValueError, match="even_cu_seqlens: length must be at least 0, got -1"):
        even_cu_seqlens(2, -1, torch.device("cpu"))
    assert lengthened_cu_seqlens(int32(0, 5), most - 5)[-1] == most
    with pytest.raises(ValueError, match=f"lengthened_cu_seqlens: offsets must fit in int32, got {most + 1}"):
        lengthened_cu_seqlens(int32(0, 5), most - 4)
    with pytest.raises(ValueError, match="lengthened_cu_seqlens: rows must be at least 0, got -1"):
        lengthened_cu_seqlens(int32(0, 5), -1)


def test_lengths_of_offsets_that_are_none_are_refused() -> None:
    assert lengths_on_host(int32(0, 2, 2, 5)) == [2, 0, 3]
    for offsets, message in ((int32(1, 2), "start at 0, got 1"), (int32(0, 3, 2), "not decrease, got 3 then 2")):
        with pytest.raises(ValueError, match=f"lengths_on_host: cu_seqlens must {message}"):
            lengths_on_host(offsets)


def test_the_host_reads_what_it_has_and_only_that() -> None:
    host, known, unknown = int32(0, 2), int32(0, 2).as_subclass(OnDevice), int32(0, 2).as_subclass(OnDevice)
    remember_on_host(known, host)
    assert [numbers is None for numbers in map(host_numbers, (host, known, unknown))] == [False, False, True]
    assert host_numbers(host.to("meta")) is None
    with pytest.raises(ValueError, match="f: cu_seqlens must end at the number of packed rows 3, got 2"):
        validate_cu_seqlens("f", known, 3)
    host[1] = 3  # what a loader fills again is looked at again
    validate_cu_seqlens("f", host, 3)


def test_what_only_a_device_has_is_checked_there_and_nobody_waits(inner_operations: type) -> None:
    good, bad, short = (tensor.as_subclass(OnDevice) for tensor in (int32(0, 2, 3), int32(0, 5, 3), int32(1, 3)))
    with inner_operations() as seen:
        validate_cu_seqlens("f", good, 3)
        validate_indices("f", "item", good, 4)
    assert seen.names.count("aten::_assert_async") == 2 and seen.readbacks == []
    for wrong in (bad, short):
        with pytest.raises(RuntimeError, match="f: cu_seqlens must start at 0, never decrease and end at"):
            validate_cu_seqlens("f", wrong, 3)
    for size in (2, 3):
        with pytest.raises(RuntimeError, match="f: item must lie within its bounds"):
            validate_indices("f", "item", bad, size)


def test_a_device_is_asked_once_until_something_is_written(inner_operations: type) -> None:
    offsets = int32(0, 2, 3).as_subclass(OnDevice)
    with inner_operations() as seen:
        for _ in range(3):
            validate_cu_seqlens("f", offsets, 3)
    assert seen.names.count("aten::_assert_async") == 1
    with pytest.raises(RuntimeError, match="cu_seqlens must"):
        validate_cu_seqlens("f", offsets, 4)  # another rule
    offsets.add_(1)
    for _ in range(2):  # what did not hold is not remembered to hold
        with pytest.raises(RuntimeError, match="cu_seqlens must"):
            validate_cu_seqlens("f", offsets, 3)


def test_in_inference_mode_where_no_write_is_counted_a_device_is_asked_every_time() -> None:
    with torch.inference_mode():
        indices = int32(0, 2).as_subclass(OnDevice)
        validate_indices("f", "item", indices, 3)
        indices.add_(1)
        with pytest.raises(RuntimeError, match="f: item must lie"):
            validate_indices("f", "item", indices, 3)


def test_indices_that_were_made_here_are_not_asked_for_again(inner_operations: type) -> None:
    indices = int32(0, 2).as_subclass(OnDevice)
    remember_indices(indices, 3)
    with inner_operations() as seen:
        validate_indices("f", "item", indices, 3)
        validate_indices("f", "item", indices, 4)
    assert seen.names.count("aten::_assert_async") == 1


def test_nothing_is_asked_of_tensors_without_numbers() -> None:
    offsets = int32(5, 3).to("meta")
    validate_cu_seqlens("f", offsets, 3)
    validate_indices("f", "item", offsets, 1)
    hold_on_device(offsets, "never", lambda: pytest.fail("asked"), "f: never")
    assert segment_sum(ROWS.to("meta"), offsets).is_meta


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_graphs_check_as_they_run(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(segment_mean, fullgraph=True, backend=backend)
    assert torch.equal(compiled(ROWS, int32(0, 1, 3)), segment_mean(ROWS, int32(0, 1, 3)))
    with pytest.raises(RuntimeError, match="segment_mean: cu_seqlens must start at 0"):
        compiled(ROWS, int32(0, 1, 9))
    torch.compiler.reset()
    dispatch = torch.compile(dispatch_queries, fullgraph=True, backend=backend)
    with pytest.raises(ValueError, match="dispatch_queries: expert must be between 0 and 3, got 4"):
        dispatch(torch.ones(4, 1, 1), int32(4)[None])


def test_transformations_of_torch_func_are_checked_by_the_device() -> None:
    rows, offsets = torch.randn(5, 3), torch.tensor([0, 2, 5], dtype=torch.int32)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return segment_sum(values, offsets).square().sum()

    expected = torch.autograd.functional.jacobian(loss, rows)
    torch.testing.assert_close(torch.func.grad(loss)(rows), expected)
    offsets[2] = 9
    with pytest.raises(RuntimeError, match="segment_sum: cu_seqlens must start at 0, never decrease and end at"):
        torch.func.grad(loss)(rows)
