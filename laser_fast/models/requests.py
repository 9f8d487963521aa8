"""Requests in external ids: histories packed as indices, items looked up."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laser_fast.data.sequences import PackedSequences


@dataclass(frozen=True)
class Recommendation:
    """One recommended item: its external id and its score (higher is better)."""

    item_id: str
    score: float


def pack_histories(histories: Sequence[Sequence[str]], index_of_item: Mapping[str, int]) -> PackedSequences:
    """Histories of external ids as packed indices; ids that are not in the catalogue are dropped with one warning.

    Raises:
        TypeError: a history that is a string instead of a list of strings.
    """
    unknown: list[str] = []
    rows = []
    for history in histories:
        if isinstance(history, str):
            raise TypeError(f"recommend: a history must be a list of item ids, got the string {history!r}")
        rows.append([index_of_item[item] for item in history if item in index_of_item])
        unknown += [item for item in history if item not in index_of_item]
    if unknown:
        warnings.warn(
            f"recommend: {len(unknown)} ids are not in the catalogue and were dropped, the first is {unknown[0]!r}",
            stacklevel=3,
        )
    return PackedSequences.from_lists(rows)


def blocked_items(exclude: Iterable[str], allow: Iterable[str] | None, index_of_item: Mapping[str, int]) -> Tensor:
    """Items that nobody may get: bool [I].

    Args:
        exclude: external ids that are blocked.
        allow: the only ids that are not; None = all.

    Raises:
        ValueError: an id that is not in the catalogue; names the argument.
    """
    blocked = torch.zeros(len(index_of_item), dtype=torch.bool)
    blocked[_indices("exclude", exclude, index_of_item)] = True
    if allow is not None:
        allowed = torch.zeros_like(blocked)
        allowed[_indices("allow", allow, index_of_item)] = True
        blocked |= ~allowed
    return blocked


def best_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items of each row of scores [B, I], best first, ties by item index: scores and items, [B, min(k, I)].

    Items with a score of -inf are blocked; they may stand at the end.
    """
    order = scores.sort(dim=1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k]


def name_items(scores: Tensor, items: Tensor, item_ids: Sequence[str]) -> list[list[Recommendation]]:
    """Scores and item indices, [B, k] both, as recommendations; places with -inf are left out."""
    return [
        [Recommendation(item_ids[index], value) for value, index in zip(*pair, strict=True) if value != -torch.inf]
        for pair in zip(scores.tolist(), items.tolist(), strict=True)
    ]


def _indices(argument: str, ids: Iterable[str], index_of_item: Mapping[str, int]) -> Tensor:
    indices = []
    for item_id in ids:
        if item_id not in index_of_item:
            raise ValueError(f"recommend: {argument} must name items of the catalogue, got {item_id!r}")
        indices.append(index_of_item[item_id])
    return torch.tensor(indices, dtype=torch.int64)
