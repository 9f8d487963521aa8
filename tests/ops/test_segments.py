"""Packed sums and means against slices, and the checks of cu_seqlens."""

from __future__ import annotations

import pytest
import torch

from laser_fast.ops import (
    cu_seqlens_from_lengths,
    segment_ids,
    segment_mean,
    segment_positions,
    segment_sum,
)
from laser_fast.ops.segments import check_cu_seqlens, validate_cu_seqlens

LENGTHS = [
    pytest.param([3], id="one"),
    pytest.param([0, 3, 0, 0, 5, 1, 0], id="empties-everywhere"),
    pytest.param([0, 0], id="all-empty"),
    pytest.param([], id="no-sequence"),
    pytest.param([129, 1, 64], id="long"),
]


def _packed(lengths: list[int], *trailing: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    values = torch.randn(sum(lengths), *trailing, generator=generator, dtype=torch.float64)
    return values, cu_seqlens_from_lengths(torch.tensor(lengths, dtype=torch.int64))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_ids_and_positions_describe_the_sequences(lengths: list[int]) -> None:
    _, cu_seqlens = _packed(lengths)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    ids = segment_ids(cu_seqlens, sum(lengths))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [b for b, length in enumerate(lengths) for _ in range(length)]
    positions = segment_positions(cu_seqlens, sum(lengths))
    assert positions.dtype == torch.int64
    assert positions.tolist() == [position for length in lengths for position in range(length)]


@pytest.mark.parametrize("trailing", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sum_and_mean_equal_slices(lengths: list[int], trailing: tuple[int, ...]) -> None:
    values, cu_seqlens = _packed(lengths, *trailing)
    total, mean = segment_sum(values, cu_seqlens), segment_mean(values, cu_seqlens)
    assert total.shape == mean.shape == (len(lengths), *trailing)
    for b, rows in enumerate(values.split(lengths) if lengths else []):
        torch.testing.assert_close(total[b], rows.sum(0), rtol=1e-12, atol=1e-12)
        expected = rows.mean(0) if len(rows) else torch.zeros(trailing, dtype=torch.float64)
        torch.testing.assert_close(mean[b], expected, rtol=1e-12, atol=1e-12)


def test_strided_values_give_the_same_sum() -> None:
    values, cu_seqlens = _packed([2, 0, 4], 6)
    strided = torch.stack([values, values], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(segment_sum(strided, cu_seqlens), segment_sum(values, cu_seqlens))


@pytest.mark.parametrize("reduce", [segment_sum, segment_mean])
def test_gradients(reduce: object) -> None:
    values, cu_seqlens = _packed([2, 0, 4], 3)
    assert callable(reduce)
    assert torch.autograd.gradcheck(lambda x: reduce(x, cu_seqlens), values.requires_grad_())


def test_mean_compiles_without_graph_break_and_reads_nothing_back(inner_operations: type) -> None:
    values, cu_seqlens = _packed([2, 0, 4], 3)
    compiled = torch.compile(segment_mean, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values, cu_seqlens), segment_mean(values, cu_seqlens))
    with inner_operations() as seen:
        segment_mean(values, cu_seqlens)
        segment_ids(cu_seqlens, 6)
    assert len(seen.names) > 3
    assert seen.readbacks == []


def test_readbacks_are_noticed(inner_operations: type) -> None:
    with inner_operations() as seen:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert len(seen.readbacks) == 2


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        pytest.param(
            torch.tensor([0, 2]), TypeError, r"f: cu_seqlens must be torch.int32, got torch.int64", id="dtype"
        ),
        pytest.param(torch.zeros(1, 2, dtype=torch.int32), ValueError, r"shape \[B \+ 1\], got \(1, 2\)", id="2d"),
        pytest.param(torch.zeros(0, dtype=torch.int32), ValueError, r"shape \[B \+ 1\], got \(0,\)", id="no-entry"),
        pytest.param(
            torch.zeros(2, dtype=torch.int32, device="meta"), ValueError, "must be on cpu .*, got meta", id="device"
        ),
    ],
)
def test_check_names_the_broken_rule(cu_seqlens: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_cu_seqlens("f", cu_seqlens, torch.device("cpu"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param([1, 4], "f: cu_seqlens must start at 0, got 1", id="start"),
        pytest.param([0, 3], "must end at the number of packed rows 4, got 3", id="end"),
        pytest.param([0, 3, 2, 4], "must not decrease, got 3 then 2 at position 1", id="order"),
    ],
)
def test_validate_names_the_broken_rule(content: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_cu_seqlens("f", torch.tensor(content, dtype=torch.int32), 4)


def test_validate_accepts_what_is_right() -> None:
    for content, num_rows in (([0, 0, 4, 4], 4), ([0], 0)):
        cu_seqlens = torch.tensor(content, dtype=torch.int32)
        validate_cu_seqlens("f", cu_seqlens, num_rows)  # raises nothing
        assert cu_seqlens.tolist() == content


def test_arguments_are_checked() -> None:
    _, cu_seqlens = _packed([1])
    with pytest.raises(TypeError, match=r"segment_sum: values must be floating point, got torch.int64"):
        segment_sum(torch.ones(1, dtype=torch.int64), cu_seqlens)
    with pytest.raises(ValueError, match=r"segment_mean: values must have shape \[N, ...\], got \(\)"):
        segment_mean(torch.tensor(1.0), cu_seqlens)
    with pytest.raises(TypeError, match=r"cu_seqlens_from_lengths: lengths must be integers, got torch.float32"):
        cu_seqlens_from_lengths(torch.ones(2))
    with pytest.raises(ValueError, match=r"lengths must have shape \[B\], got \(1, 2\)"):
        cu_seqlens_from_lengths(torch.ones(1, 2, dtype=torch.int64))
