"""The k best items of the catalogue for every user; the scores of all items are never held at once.

    score_bi = cos(u_b, v_i) / temperature   (or u_b . v_i / temperature);   among equals the lower item index wins

Walks over chunks of items and merges their best. `torch.topk` promises no order among equals, so it sorts unique keys:
the float32 score, as an integer that orders alike, in the upper half of an int64, the reversed item index in the lower.
Memory-bound for few users, as it reads the items once; memory O(B k + chunk). Source: our own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from laser_fast.ops.catalog import check_catalog, chunk_scores, locate, scaled_users, unit_rows
from laser_fast.ops.checks import check_count, check_dimensions, check_dtype, check_one_device
from laser_fast.ops.operation import operation
from laser_fast.ops.precision import autocast_off, wide_dtype
from laser_fast.ops.segments import check_cu_seqlens, segment_ids, validate_cu_seqlens

_LOW_HALF = 0xFFFFFFFF


class ItemLists(NamedTuple):
    """One list of item indices per user, packed; lists may be empty, unsorted and hold an index twice.

    Attributes:
        items: int64 [n]; an index outside the catalogue names no item.
        cu_seqlens: int32 [B + 1].
    """

    items: Tensor
    cu_seqlens: Tensor


def _ordered_bits(bits: Tensor) -> Tensor:
    """Integers that order as floats do, from the bits of the floats, int32; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _keys(scores: Tensor, start: int) -> Tensor:
    """Unique int64 keys [B, C] of the float32 scores of the items from `start` on: larger is better."""
    keys = _ordered_bits(scores.view(torch.int32)).to(torch.int64)
    reversed_index = _LOW_HALF - torch.arange(start, start + scores.shape[1], device=scores.device)
    return keys.bitwise_left_shift_(32).bitwise_or_(reversed_index)


def _exclude(scores: Tensor, start: int, row: Tensor, item: Tensor) -> None:
    """Set `scores[row, item - start]` to -inf for the pairs that lie in the chunk, in place."""
    column, inside = locate(item, start, scores.shape[1])
    bound = torch.where(inside, -torch.inf, torch.inf).to(scores.dtype)  # the others take the minimum with +inf
    scores.view(-1).scatter_reduce_(0, row * scores.shape[1] + column, bound, "amin")


@operation("laser_fast::catalog_topk")
def _catalog_topk(
    users: Tensor,
    items: Tensor,
    k: int,
    exclude_items: Tensor | None,
    exclude_cu_seqlens: Tensor | None,
    allow: Tensor | None,
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    row = None
    if exclude_items is not None and exclude_cu_seqlens is not None:
        validate_cu_seqlens("catalog_topk: exclude", exclude_cu_seqlens, exclude_items.shape[0])
        row = segment_ids(exclude_cu_seqlens, exclude_items.shape[0])
    scaled = scaled_users(users, wide_dtype(users, items), temperature, normalize)
    best = _keys(scaled.new_full((users.shape[0], 1), -torch.inf, dtype=torch.float32), 0).repeat(1, k)
    with autocast_off(users.device):
        for start, scores in chunk_scores(scaled, items, normalize):
            # adding 0 turns -0 into +0, so that they tie; NaN never wins a place
            scores = scores.float().nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).add_(0.0)
            num_columns = scores.shape[1]
            if allow is not None:
                scores.masked_fill_(~allow[start : start + num_columns], -torch.inf)
            if exclude_items is not None and row is not None:
                _exclude(scores, start, row, exclude_items)
            chunk_best = _keys(scores, start).topk(min(k, num_columns), dim=1).values
            best = torch.cat([best, chunk_best], dim=1).topk(k, dim=1).values
    best_scores = _ordered_bits((best >> 32).to(torch.int32)).view(torch.float32)
    best_items = _LOW_HALF - (best & _LOW_HALF)
    return best_scores, best_items.masked_fill_(best_scores == -torch.inf, -1)


@_catalog_topk.register_fake
def _(users: Tensor, items: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (users.shape[0], k)
    return users.new_empty(shape, dtype=torch.float32), users.new_empty(shape, dtype=torch.int64)


def catalog_topk_reference(
    users: Tensor,
    items: Tensor,
    k: int,
    *,
    exclude: ItemLists | None = None,
    allow: Tensor | None = None,
    temperature: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """`catalog_topk` as one stable sort of all scores [B, I]; arguments are trusted."""
    wide = wide_dtype(users, items)
    users, items = users.to(wide), items.to(wide)
    if normalize:
        users, items = unit_rows(users), unit_rows(items)
    with autocast_off(users.device):
        scores = (users @ items.T / temperature).float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    if allow is not None:
        scores = scores.masked_fill(~allow, -torch.inf)
    if exclude is not None:
        known = (exclude.items >= 0) & (exclude.items < items.shape[0])
        row = segment_ids(exclude.cu_seqlens, exclude.items.shape[0])
        scores[row[known], exclude.items[known]] = -torch.inf
    best, index = scores.sort(dim=1, descending=True, stable=True)
    missing = max(k - items.shape[0], 0)
    best = torch.nn.functional.pad(best[:, :k], (0, missing), value=-torch.inf)
    index = torch.nn.functional.pad(index[:, :k], (0, missing), value=-1)
    return best, index.masked_fill(best == -torch.inf, -1)


@torch.no_grad()
def catalog_topk(
    users: Tensor,
    items: Tensor,
    k: int,
    *,
    exclude: ItemLists | None = None,
    allow: Tensor | None = None,
    temperature: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k items with the highest scores for every user (formula at the head of this file); no gradient.

    Scores are accumulated in float32 whatever autocast says (float64 stays float64) and ranked by their float32 value;
    a NaN or -inf score counts as no item. A list shorter than k is padded with score -inf and item -1.

    Args:
        users: [B, d], floating point, any strides.
        items: [I, d], floating point, any strides.
        k: length of the lists, at least 1; may exceed I.
        exclude: items never to return, per user.
        allow: bool [I], shared by all users: False is never returned. For a short list of allowed items, pass their
            rows as `items` instead.
        temperature: positive number that divides the scores.
        normalize: True: cosine, where a zero row has cosine 0; False: inner product.

    Returns:
        Scores float32 [B, k], descending, and item indices int64 [B, k].
    """
    name = "catalog_topk"
    check_catalog(name, users, items, temperature)
    if items.shape[0] > _LOW_HALF:
        raise ValueError(f"{name}: items must have at most {_LOW_HALF} rows, got {items.shape[0]}")
    check_count(name, k=k)
    if k < 1:
        raise ValueError(f"{name}: k must be at least 1, got {k}")
    if exclude is not None:
        _check_exclude(name, exclude, users)
    if allow is not None:
        check_dtype(name, torch.bool, allow=allow)
        check_one_device(name, items=items, allow=allow)
        if tuple(allow.shape) != (items.shape[0],):
            raise ValueError(f"{name}: allow must have shape {(items.shape[0],)}, got {tuple(allow.shape)}")
    found: tuple[Tensor, Tensor] = _catalog_topk(
        users, items, k, *(exclude or (None, None)), allow, float(temperature), normalize
    )
    return found


def _check_exclude(name: str, exclude: ItemLists, users: Tensor) -> None:
    check_dtype(name, torch.int64, **{"exclude.items": exclude.items})
    check_dimensions(name, 1, **{"exclude.items": exclude.items})
    check_one_device(name, users=users, **{"exclude.items": exclude.items})
    check_cu_seqlens(name, exclude.cu_seqlens, users.device)
    if exclude.cu_seqlens.shape[0] != users.shape[0] + 1:
        raise ValueError(
            f"{name}: exclude must have one list per user ({users.shape[0]}), got {exclude.cu_seqlens.shape[0] - 1}"
        )
