"""Ranks of targets, and HR@K, NDCG@K and MRR with standard errors and 95% intervals."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_Z95 = 1.959963984540054  # half width of a 95% normal interval, in standard errors
_METRIC = re.compile(r"(HR|NDCG)@([1-9][0-9]{0,8})|MRR")


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """rank_b = 1 + |{i : score_bi > score_b,target}| + |{i != target : score_bi = score_b,target}| (pessimistic).

    An item tied with the target counts as ranked before it, so a constant scorer gets the last rank, not the first.

    Args:
        scores: [B, I], any float dtype, higher is better; -inf for excluded items, no NaN.
        targets: [B] int64, item of each row.

    Returns:
        [B] int64 in 1..I, on the device of `scores`.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"target_ranks: targets must be int64, got {targets.dtype}")
    if scores.dim() != 2 or targets.dim() != 1 or scores.shape[0] != targets.shape[0]:
        raise ValueError(
            "target_ranks: scores and targets must have shapes [B, I] and [B], "
            f"got {tuple(scores.shape)} and {tuple(targets.shape)}"
        )
    num_items = scores.shape[1]
    if targets.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    if int(targets.min()) < 0 or int(targets.max()) >= num_items:
        value = int(targets[(targets < 0) | (targets >= num_items)][0])
        raise ValueError(f"target_ranks: targets must be in 0..{num_items - 1}, got {value}")
    not_a_number = torch.isnan(scores)
    if bool(not_a_number.any()):
        row, item = (int(x) for x in not_a_number.nonzero()[0])
        raise ValueError(f"target_ranks: scores must not be NaN, got NaN in row {row} for item {item}")
    # the target itself satisfies >=: the leading 1
    return (scores >= scores.gather(1, targets.to(scores.device)[:, None])).sum(dim=1)


def rank_values(ranks: Tensor, metric: str) -> Tensor:
    """Value of one metric for each row: HR@K = [rank <= K], NDCG@K = [rank <= K] / log2(1 + rank), MRR = 1 / rank.

    Args:
        ranks: int64 of any shape, each >= 1.
        metric: "HR@K", "NDCG@K" (K >= 1) or "MRR".

    Returns:
        float64 of the same shape.
    """
    match = _METRIC.fullmatch(metric)
    if match is None:
        raise ValueError(f'rank_values: metric must be "HR@K", "NDCG@K" or "MRR", got {metric!r}')
    if ranks.numel() and int(ranks.min()) < 1:
        raise ValueError(f"rank_values: ranks must be at least 1, got {int(ranks.min())}")
    exact = ranks.double()
    if metric == "MRR":
        return exact.reciprocal()
    hit = (ranks <= int(match[2])).double()
    return hit if match[1] == "HR" else hit / torch.log2(1.0 + exact)


def or_none(number: float) -> float | None:
    """None for NaN."""
    return None if math.isnan(number) else number


def metric_names(ks: Sequence[int]) -> list[str]:
    """HR@K, NDCG@K and MRR."""
    return [f"HR@{k}" for k in ks] + [f"NDCG@{k}" for k in ks] + ["MRR"]


@dataclass(frozen=True)
class MetricValue:
    """Mean over rows; NaN where it is not defined, for the error with fewer than two rows."""

    mean: float
    standard_error: float

    @property
    def ci95(self) -> float:
        """Half width of the 95% normal interval around the mean."""
        return _Z95 * self.standard_error

    @classmethod
    def from_values(cls, values: Tensor) -> "MetricValue":
        """Mean and standard error (sample deviation / sqrt(B)) of `values` [B]."""
        count = values.numel()
        exact = values.double()
        mean = exact.mean().item() if count else math.nan
        return cls(mean, exact.std().item() / math.sqrt(count) if count > 1 else math.nan)

    def to_dict(self) -> dict[str, float | None]:
        """Plain numbers; None for NaN, which JSON has not."""
        return {"mean": or_none(self.mean), "standard_error": or_none(self.standard_error), "ci95": or_none(self.ci95)}

    def __str__(self) -> str:
        return "-" if math.isnan(self.mean) else f"{self.mean:.4f} +- {self.ci95:.4f}"


@dataclass(frozen=True)
class RankingMetrics:
    """HR@K, NDCG@K and MRR of one system on one set of rows, by name: `metrics["NDCG@10"].mean`."""

    values: Mapping[str, MetricValue]
    # [B] int64 on the CPU, the rank of each row's target; [D, B] among candidates of D draws
    ranks: Tensor = field(repr=False, compare=False)

    @classmethod
    def from_ranks(cls, ranks: Tensor, ks: Sequence[int] = (1, 5, 10, 20)) -> "RankingMetrics":
        """Metrics of ranks [B] int64, each >= 1, with the cut-offs `ks`; NaN for no rows."""
        if any(k < 1 for k in ks):
            raise ValueError(f"RankingMetrics.from_ranks: ks must be at least 1, got {tuple(ks)}")
        values = {name: MetricValue.from_values(rank_values(ranks, name)) for name in metric_names(ks)}
        return cls(values, ranks.detach().cpu())

    def __getitem__(self, name: str) -> MetricValue:
        if name not in self.values:
            raise KeyError(f"RankingMetrics: no metric {name!r}, got {', '.join(self.values)}")
        return self.values[name]

    def __len__(self) -> int:
        """Number of rows."""
        return self.ranks.shape[-1]

    def to_dict(self) -> dict[str, Any]:
        """`{"rows": B, "metrics": {name: {"mean", "standard_error", "ci95"}}}`, and "draws": D; without the ranks."""
        drawn = {"draws": self.ranks.shape[0]} if self.ranks.dim() == 2 else {}
        return {"rows": len(self), "metrics": {name: value.to_dict() for name, value in self.values.items()}} | drawn


def paired_difference(ranks_a: Tensor, ranks_b: Tensor, metric: str = "NDCG@10") -> MetricValue:
    """Mean of metric(a) - metric(b) over the same rows, with the standard error of that difference.

    Args:
        ranks_a, ranks_b: [B] int64, ranks of the same targets.
        metric: as in `rank_values`.
    """
    if ranks_a.shape != ranks_b.shape:
        raise ValueError(
            "paired_difference: both systems must have ranked the same rows, "
            f"got {tuple(ranks_a.shape)} and {tuple(ranks_b.shape)} ranks"
        )
    return MetricValue.from_values(rank_values(ranks_a, metric) - rank_values(ranks_b, metric))


def table(systems: Mapping[str, RankingMetrics | Mapping[str, object]], metrics: Sequence[str] | None = None) -> str:
    """Aligned text: a line per system, a column per metric, those of the first by default; "" for no systems."""
    if not systems:
        return ""
    figures = {name: found.values if isinstance(found, RankingMetrics) else found for name, found in systems.items()}
    columns = list(next(iter(figures.values())) if metrics is None else metrics)
    lines = [[name, *(str(found[column]) for column in columns)] for name, found in figures.items()]
    return aligned([["", *columns], *lines])


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Lines of text columns, the first aligned to the left and the others to the right."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)
