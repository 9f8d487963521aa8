"""Full ranking: every row's target among the whole catalogue, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from laser_fast.evaluation.metrics import RankingMetrics, target_ranks
from laser_fast.recommenders.protocol import Scorer

if TYPE_CHECKING:
    from laser_fast.data import EvaluationRows


def row_batches(
    rows: EvaluationRows, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of the rows as tensors: items [N] int64, cu_seqlens [B+1] int32, targets [B] int64."""
    if batch_size < 1:
        raise ValueError(f"row_batches: batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(rows), batch_size):
        chunk = rows.select(np.arange(start, min(start + batch_size, len(rows))))
        # torch.tensor copies: the arrays may be read-only memory maps
        yield (
            torch.tensor(chunk.histories.items, dtype=torch.int64, device=device),
            torch.tensor(chunk.histories.cu_seqlens, dtype=torch.int32, device=device),
            torch.tensor(chunk.targets, dtype=torch.int64, device=device),
        )


def row_scores(
    function: str, scorer: Scorer, rows: EvaluationRows, batch_size: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores [B, I] and targets [B] int64 of each chunk of `row_batches`; `function` begins the error's message."""
    for items, cu_seqlens, targets in row_batches(rows, batch_size, device):
        scores, expected = scorer.score(items, cu_seqlens), (len(targets), scorer.num_items)
        if scores.shape != expected:
            raise ValueError(f"{function}: score must return shape {expected}, got {tuple(scores.shape)}")
        yield scores, targets


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    rows: EvaluationRows,
    *,
    batch_size: int = 256,
    progress: bool = False,
    device: torch.device | str = "cpu",
) -> RankingMetrics:
    """Rank each row's target among all items of the catalogue; items of the history are not filtered.

    Args:
        rows: B histories with one target each.
        batch_size: rows scored at a time; memory holds about `2 * batch_size * I` scores.
        progress: show a bar that counts rows.
        device: where the histories are put for `scorer.score`.
    """
    ranks = [torch.empty(0, dtype=torch.int64)]
    with tqdm(total=len(rows), desc="evaluate", unit="row", disable=not progress) as bar:
        for scores, targets in row_scores("evaluate", scorer, rows, batch_size, device):
            ranks.append(target_ranks(scores, targets).cpu())
            bar.update(len(targets))
    return RankingMetrics.from_ranks(torch.cat(ranks))
