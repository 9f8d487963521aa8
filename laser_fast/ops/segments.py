"""Offsets, sums and means of the sequences of a packed batch: sequence b is `x[cu_seqlens[b]:cu_seqlens[b + 1]]`.

All functions are deterministic, treat a sequence independently of the others, and do not wait for the device unless
they say so. Offsets are checked first, form and content (`checks`), so nothing is read or written outside a tensor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from laser_fast.ops.checks import INT32_MAX, check_floating, hold_on_device, host_numbers, validate_indices
from laser_fast.ops.host_copies import known_on_host, on_host, remember_on_host


def check_cu_seqlens(function: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """Check form, not content: int32, one dimension, at least one entry, on `device`."""
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{function}: cu_seqlens must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{function}: cu_seqlens must have shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"{function}: cu_seqlens must be on {device} like the packed rows, got {cu_seqlens.device}")


def validate_cu_seqlens(function: str, cu_seqlens: Tensor, num_rows: int) -> None:
    """Check form and content: offsets start at 0, never decrease and end at `num_rows`."""
    check_cu_seqlens(function, cu_seqlens, cu_seqlens.device)
    numbers = host_numbers(cu_seqlens)
    if numbers is not None:
        _refuse_order(function, numbers)
        if numbers[-1] != num_rows:
            raise ValueError(
                f"{function}: cu_seqlens must end at the number of packed rows {num_rows}, got {numbers[-1]}"
            )
        return

    def fits() -> Tensor:
        return (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_rows) & (cu_seqlens.diff() >= 0).all()

    message = f"{function}: cu_seqlens must start at 0, never decrease and end at the number of packed rows"
    hold_on_device(cu_seqlens, ("cu_seqlens", num_rows), fits, message)


def _refuse_order(function: str, cu_seqlens: np.ndarray) -> None:
    if cu_seqlens[0] != 0:
        raise ValueError(f"{function}: cu_seqlens must start at 0, got {cu_seqlens[0]}")
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if falls.any():
        where = int(falls.argmax())
        found = f"{cu_seqlens[where]} then {cu_seqlens[where + 1]} at position {where}"
        raise ValueError(f"{function}: cu_seqlens must not decrease, got {found}")


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """`cu_seqlens[b] = sum of lengths[:b]`, int32 [B + 1] on the device of `lengths`.

    Args:
        lengths: [B], integers, none negative, at most 2^31 - 1 in all.
    """
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"cu_seqlens_from_lengths: lengths must be integers, got {lengths.dtype}")
    if lengths.dim() != 1:
        raise ValueError(f"cu_seqlens_from_lengths: lengths must have shape [B], got {tuple(lengths.shape)}")
    # each fits in int32, so that their sums cannot wrap in int64
    validate_indices("cu_seqlens_from_lengths", "lengths", lengths, INT32_MAX + 1)
    numbers, ends = host_numbers(lengths), lengths.long().cumsum(0)
    rule = f"cu_seqlens_from_lengths: lengths must sum to at most {INT32_MAX}"
    if numbers is None:
        hold_on_device(ends, "int32", lambda: (ends <= INT32_MAX).all(), rule)
    elif (total := int(numbers.sum(dtype=np.int64))) > INT32_MAX:
        raise ValueError(f"{rule}, got {total}; split the batch")
    return torch.cat([ends.new_zeros(1), ends]).int()


def even_cu_seqlens(num_sequences: int, length: int, device: torch.device) -> Tensor:
    """Offsets of sequences of one length, which the host knows: int32 [B + 1]."""
    _refuse_rows("even_cu_seqlens", "length", length, num_sequences * length)
    host = torch.arange(num_sequences + 1, dtype=torch.int32) * length
    if device.type == "cpu":
        return host
    return remember_on_host(torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length, host)


def lengthened_cu_seqlens(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Offsets where every sequence has so many rows more; the host knows them if it knew the others: int32 [B + 1]."""
    numbers = host_numbers(cu_seqlens)
    last = 0 if numbers is None else int(numbers[-1])
    _refuse_rows("lengthened_cu_seqlens", "rows", rows, last + (cu_seqlens.shape[0] - 1) * rows)
    longer = cu_seqlens + torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device, dtype=torch.int32) * rows
    host = known_on_host(cu_seqlens)
    return longer if host is None or host is cu_seqlens else remember_on_host(longer, lengthened_cu_seqlens(host, rows))


def _refuse_rows(function: str, name: str, rows: int, total: int) -> None:
    if rows < 0:
        raise ValueError(f"{function}: {name} must be at least 0, got {rows}")
    if total > INT32_MAX:
        raise ValueError(f"{function}: offsets must fit in int32, got {total}; split the batch")


def lengths_on_host(cu_seqlens: Tensor) -> list[int]:
    """Rows of every sequence; waits for the device where the host does not know them. On the meta device all are 0."""
    check_cu_seqlens("lengths_on_host", cu_seqlens, cu_seqlens.device)
    if cu_seqlens.is_meta:
        return [0] * (cu_seqlens.shape[0] - 1)
    bounds = np.array(on_host(cu_seqlens).tolist())
    _refuse_order("lengths_on_host", bounds)
    lengths: list[int] = np.diff(bounds).tolist()
    return lengths


def segment_ids(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Sequence of every packed row, int64 [num_rows]: a search per row, so nothing is read back from the device."""
    validate_cu_seqlens("segment_ids", cu_seqlens, num_rows)
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=torch.int32)
    return torch.bucketize(rows, cu_seqlens[1:], right=True)


def segment_positions(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Place of every packed row in its own sequence, from 0: int64 [num_rows]."""
    validate_cu_seqlens("segment_positions", cu_seqlens, num_rows)
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=num_rows)
    return torch.arange(num_rows, device=cu_seqlens.device) - starts


def _check_packed(function: str, values: Tensor, cu_seqlens: Tensor) -> None:
    check_floating(function, values=values)
    if values.dim() == 0:
        raise ValueError(f"{function}: values must have shape [N, ...], got ()")
    check_cu_seqlens(function, cu_seqlens, values.device)
    validate_cu_seqlens(function, cu_seqlens, values.shape[0])


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of the rows of every sequence, in row order and in their own dtype; 0 for an empty one. Differentiable.

    Args:
        values: [N, ...], floating point.
        cu_seqlens: int32 [B + 1], from 0 to N.

    Returns:
        [B, ...], dtype of `values`.
    """
    _check_packed("segment_sum", values, cu_seqlens)
    return _sum(values, cu_seqlens)


def _sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    # only behind `_check_packed`: it reads wherever offsets point, with unsafe=False too
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, axis=0, unsafe=True, initial=0.0)


def segment_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of the rows of every sequence; 0 for an empty one. Arguments and result as in `segment_sum`."""
    _check_packed("segment_mean", values, cu_seqlens)
    lengths = cu_seqlens.diff().clamp_min(1).to(values.dtype)
    return _sum(values, cu_seqlens) / lengths.view(-1, *[1] * (values.dim() - 1))
