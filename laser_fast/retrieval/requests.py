"""Requests in external ids: histories packed as indices, items looked up."""

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laser_fast.data.sequences import PackedSequences

ItemId = str | int
"""An external id in a request: text, or a whole number for the text with its digits."""


@dataclass(frozen=True)
class Recommendation:
    """One recommended item; a higher score is better."""

    item_id: str
    score: float


def pack_histories(histories: Iterable[Iterable[ItemId]], index_of_item: Mapping[str, int]) -> PackedSequences:
    """Histories of external ids as packed indices; ids outside the catalogue are dropped with one warning.

    Raises:
        TypeError: `histories`, or one of them, is no ordered collection (list, tuple, array, column, generator).
    """
    unknown: list[str] = []
    rows, emptied = [], 0
    for history in _elements("histories", "histories", histories, ordered=True):
        ids = list(_ids("a history", history, index_of_item, ordered=True))
        rows.append([index_of_item[item] for item in ids if item in index_of_item])
        unknown += [item for item in ids if item not in index_of_item]
        emptied += bool(ids) and not rows[-1]
    if unknown:
        left = f"; nothing is left of {emptied} histories, which are answered as empty ones" if emptied else ""
        warnings.warn(
            f"recommend: {len(unknown)} ids are not in the catalogue and were dropped, the first is {unknown[0]!r}"
            + left,
            stacklevel=3,
        )
    return PackedSequences.from_lists(rows)


def blocked_items(
    exclude: Iterable[ItemId], allow: Iterable[ItemId] | None, index_of_item: Mapping[str, int]
) -> Tensor:
    """Items to leave out, bool [I]: those of `exclude`, and all that a given `allow` does not name."""
    blocked = torch.zeros(len(index_of_item), dtype=torch.bool)
    blocked[_indices("exclude", exclude, index_of_item)] = True
    if allow is not None:
        allowed = torch.zeros_like(blocked)
        allowed[_indices("allow", allow, index_of_item)] = True
        blocked |= ~allowed
    return blocked


def wanted_items(k: Any) -> int:
    """`k` as an int of at least 1."""
    if isinstance(k, bool | np.bool_) or not hasattr(k, "__index__") or isinstance(k, Tensor | np.ndarray):
        raise TypeError(f"recommend: k must be a whole number, got {k!r}")
    if operator.index(k) < 1:
        raise ValueError(f"recommend: k must be at least 1, got {k}")
    return operator.index(k)


def best_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items of each row of scores [B, I], best first, ties by item index: scores and items, [B, min(k, I)].

    Blocked items, with a score of -inf, may stand at the end.
    """
    order = scores.sort(dim=1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k]


def name_items(scores: Tensor, items: Tensor, item_ids: Sequence[str]) -> list[list[Recommendation]]:
    """Scores and item indices, [B, k] both, as recommendations without those of score -inf."""
    return [
        [Recommendation(item_ids[index], value) for value, index in zip(*pair, strict=True) if value != -torch.inf]
        for pair in zip(scores.tolist(), items.tolist(), strict=True)
    ]


def _indices(argument: str, ids: Iterable[ItemId], index_of_item: Mapping[str, int]) -> Tensor:
    indices = []
    for item_id in _ids(argument, ids, index_of_item):
        if item_id not in index_of_item:
            raise ValueError(f"recommend: {argument} must name items of the catalogue, got {item_id!r}")
        indices.append(index_of_item[item_id])
    return torch.tensor(indices, dtype=torch.int64)


def _ids(
    argument: str, ids: Iterable[ItemId], index_of_item: Mapping[str, int], *, ordered: bool = False
) -> Iterator[str]:
    """The ids of a list as texts; whole numbers are allowed in a catalogue that has such texts."""
    for item in _elements(argument, "item ids", ids, ordered=ordered):
        if isinstance(item, str):
            yield str.__str__(item)  # plain text of NumPy's strings and others
            continue
        if not isinstance(item, int | np.integer) or isinstance(item, bool):
            raise TypeError(f"recommend: {argument} must be a list of item ids (text or whole numbers), got {item!r}")
        text = str(int(item))
        if text not in index_of_item and not any(known.isdecimal() for known in index_of_item):
            raise TypeError(
                f"recommend: {argument} must name items as the catalogue does, by text like "
                f"{next(iter(index_of_item))!r}, got the number {item}"
            )
        yield text


def _elements(argument: str, what: str, values: Any, *, ordered: bool) -> Iterable[Any]:
    """The elements of a list, a tuple, an array, a column or a generator, of a set only where order does not count."""
    other = str | bytes | bytearray | Mapping | (Set if ordered else str)
    plain = isinstance(values, Iterable) and not isinstance(values, other)
    if not plain or hasattr(values, "columns") or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"recommend: {argument} must be a list of {what}, got a {type(values).__name__}: {values!r}")
    return values.tolist() if isinstance(values, Tensor) else values
