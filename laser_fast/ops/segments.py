"""Sums and means over the sequences of a packed batch, `x[cu_seqlens[b]:cu_seqlens[b + 1]]` for every b.

All functions run without host synchronisation (but those that say so), are deterministic on every
device, treat a sequence independently of the others in the batch, and give 0 for an empty sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laser_fast.ops.arguments import check_floating
from laser_fast.ops.host_copies import known_on_host, on_host, remember_on_host


def check_cu_seqlens(function: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """Check form, not content: int32, one dimension, at least one entry, on `device`.

    Raises:
        TypeError: Another dtype.
        ValueError: Another shape or device.
    """
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{function}: cu_seqlens must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{function}: cu_seqlens must have shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"{function}: cu_seqlens must be on {device} like the packed rows, got {cu_seqlens.device}")


def validate_cu_seqlens(function: str, cu_seqlens: Tensor, num_rows: int) -> None:
    """Check content: starts at 0, never decreases, ends at `num_rows`. Waits for a GPU where the host does not know it.

    Raises:
        TypeError: Not int32.
        ValueError: One of the rules is broken.
    """
    check_cu_seqlens(function, cu_seqlens, cu_seqlens.device)
    cu_seqlens = on_host(cu_seqlens)
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"{function}: cu_seqlens must start at 0, got {first}")
    if last != num_rows:
        raise ValueError(f"{function}: cu_seqlens must end at the number of packed rows {num_rows}, got {last}")
    steps = cu_seqlens.diff()
    if bool((steps < 0).any()):
        where = int((steps < 0).int().argmax())
        found = f"{int(cu_seqlens[where])} then {int(cu_seqlens[where + 1])} at position {where}"
        raise ValueError(f"{function}: cu_seqlens must not decrease, got {found}")


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """`cu_seqlens[b] = sum of lengths[:b]`.

    Args:
        lengths: [B], integers, none negative.

    Returns:
        int32 [B + 1] on the device of `lengths`.

    Raises:
        TypeError: Not integers.
        ValueError: Not one dimension.
    """
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"cu_seqlens_from_lengths: lengths must be integers, got {lengths.dtype}")
    if lengths.dim() != 1:
        raise ValueError(f"cu_seqlens_from_lengths: lengths must have shape [B], got {tuple(lengths.shape)}")
    return torch.cat([lengths.new_zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])


def even_cu_seqlens(num_sequences: int, length: int, device: torch.device) -> Tensor:
    """Offsets of sequences of one length, which the host knows: int32 [B + 1]."""
    host = torch.arange(num_sequences + 1, dtype=torch.int32) * length
    if device.type == "cpu":
        return host
    return remember_on_host(torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length, host)


def lengthened_cu_seqlens(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Offsets where every sequence has so many rows more; the host knows them if it knew the others: int32 [B + 1]."""
    longer = cu_seqlens + torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device, dtype=torch.int32) * rows
    host = known_on_host(cu_seqlens)
    return longer if host is None or host is cu_seqlens else remember_on_host(longer, lengthened_cu_seqlens(host, rows))


def lengths_on_host(cu_seqlens: Tensor) -> list[int]:
    """Rows of every sequence; waits for the device where the host does not know them. On the meta device all are 0."""
    if cu_seqlens.is_meta:
        return [0] * (cu_seqlens.shape[0] - 1)
    found: list[int] = on_host(cu_seqlens).diff().tolist()
    return found


def segment_lengths(cu_seqlens: Tensor) -> Tensor:
    """Rows of every sequence, int32 [B]."""
    return cu_seqlens.diff()


def segment_ids(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Sequence of every packed row, int64 [num_rows].

    A search per row: its size comes from `num_rows`, so nothing has to be read back from the device.
    """
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=torch.int32)
    return torch.bucketize(rows, cu_seqlens[1:], right=True)


def segment_positions(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Place of every packed row in its own sequence, from 0: int64 [num_rows]."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=num_rows)
    return torch.arange(num_rows, device=cu_seqlens.device) - starts


def _check_packed(function: str, values: Tensor, cu_seqlens: Tensor) -> None:
    check_floating(function, values=values)
    if values.dim() == 0:
        raise ValueError(f"{function}: values must have shape [N, ...], got ()")
    check_cu_seqlens(function, cu_seqlens, values.device)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of the rows of every sequence, in row order.

    Args:
        values: [N, ...], floating point; summed in its own dtype.
        cu_seqlens: int32 [B + 1].

    Returns:
        [B, ...], dtype of `values`; differentiable.

    Raises:
        TypeError: `values` is not floating point or `cu_seqlens` not int32.
        ValueError: A shape or device does not fit.
    """
    _check_packed("segment_sum", values, cu_seqlens)
    # unsafe=True skips the check of the offsets' content, which would wait for the device
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, axis=0, unsafe=True, initial=0.0)


def segment_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of the rows of every sequence; 0 for an empty one. Arguments, result and errors as in `segment_sum`."""
    _check_packed("segment_mean", values, cu_seqlens)
    lengths = segment_lengths(cu_seqlens).clamp_min(1).to(values.dtype)
    return segment_sum(values, cu_seqlens) / lengths.view(-1, *[1] * (values.dim() - 1))
