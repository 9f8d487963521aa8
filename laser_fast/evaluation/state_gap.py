"""How much better a recommender is on rows whose targets it has seen, and how its states differ there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from laser_fast.data.sequences import EvaluationRows
from laser_fast.data.splits.split import Split, training_rows
from laser_fast.evaluation.evaluate import evaluate, row_batches
from laser_fast.evaluation.metrics import RankingMetrics
from laser_fast.recommenders.cross_fitted import StateGap, StateSpread
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.protocol import newest_items

_METRIC = "NDCG@10"
_BATCH = 256


def measure_state_gap(recommender: PackedRecommender, split: Split, *, seed: int = 0, max_rows: int = 2000) -> StateGap:
    """Rank training rows and validation rows with the full model and, where it has folds, with each row's fold.

    Args:
        recommender: fitted on `split.train`.
        seed: of the choice of training rows, every position after the first of a sequence being one.
        max_rows: training rows that are ranked.

    Returns:
        The figures; those of rows that do not exist, or of folds that do not, are None.
    """
    rows = training_rows(split.train, recommender.max_length)
    chosen = np.arange(len(rows))
    if len(chosen) > max_rows:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), max_rows, replace=False))
    train = rows.select(chosen)
    train = EvaluationRows(split.train_users[train.users], train.histories, train.targets)
    figures: dict[str, float | None] = {}
    states: dict[str, StateSpread] = {}
    for part, own in ((train, ("in_sample", "held_out")), (split.valid, ("valid", "held_out_valid"))):
        full = _last_states(recommender, part)
        figures[own[0]] = _quality(evaluate(recommender, part, batch_size=_BATCH, device=_device(recommender)).ranks)
        found = {own[0]: full}
        figures[own[1]] = None
        if recommender.cross_fitted is not None:
            ranks, found[own[1]] = _of_folds(recommender, part)
            figures[own[1]] = _quality(ranks)
        if len(part) > 1:
            states |= {name: StateSpread.of(last, full) for name, last in found.items()}
    return StateGap(rows=len(train), states=states, **figures)


def _of_folds(recommender: PackedRecommender, rows: EvaluationRows) -> tuple[Tensor, Tensor]:
    """Ranks [B] and last states [B, D] of every row by the model of its user's fold."""
    assert recommender.cross_fitted is not None
    folds = recommender.cross_fitted.of_users(rows.users)
    ranks = torch.zeros(len(rows), dtype=torch.int64)
    states = torch.zeros(len(rows), recommender.state_size)
    for fold, model in enumerate(recommender.cross_fitted.models):
        here = np.flatnonzero(folds == fold)
        part = rows.select(here)
        ranks[here] = evaluate(model, part, batch_size=_BATCH, device=_device(model)).ranks
        states[here] = _last_states(recommender, part, fold)
    return ranks, states


def _last_states(model: PackedRecommender, rows: EvaluationRows, fold: int | None = None) -> Tensor:
    """State after the newest item of every row, zeros for an empty history: float32 [B, D] on the CPU.

    Args:
        fold: whose states; None = those of the full model.
    """
    found = [torch.zeros(0, model.state_size)]
    for items, cu_seqlens, _ in row_batches(rows, _BATCH, _device(model)):
        items, cu_seqlens = newest_items(items, cu_seqlens, model.max_length)
        states = model.states(items, cu_seqlens) if fold is None else model.fold_states(items, cu_seqlens, fold)
        last = states.new_zeros(len(cu_seqlens) - 1, model.state_size)
        filled = cu_seqlens.diff() > 0
        last[filled] = states[cu_seqlens[1:][filled].long() - 1]
        found.append(last.cpu())
    return torch.cat(found)


def _quality(ranks: Tensor) -> float | None:
    return RankingMetrics.from_ranks(ranks)[_METRIC].mean if len(ranks) else None


def _device(model: PackedRecommender) -> torch.device:
    return model.item_embedding.weight.device
