"""Measure how much better a recommender is on rows whose targets it has seen, and how its states differ there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from laser_fast.data.sequences import EvaluationRows
from laser_fast.data.splits.split import Split, training_rows
from laser_fast.evaluation.evaluate import evaluate, row_batches
from laser_fast.evaluation.metrics import RankingMetrics
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.state_spread import StateGap, StateSpread

_METRIC = "NDCG@10"
_BATCH = 256


def measure_state_gap(recommender: PackedRecommender, split: Split, *, seed: int = 0, max_rows: int = 2000) -> StateGap:
    """Rank training and validation rows with the full model and, where it has folds, with each row's fold.

    Args:
        recommender: fitted on `split.train`.
        seed: of the choice of `max_rows` training rows.
    """
    rows = training_rows(split.train, recommender.max_length)
    chosen = np.arange(len(rows))
    if len(chosen) > max_rows:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), max_rows, replace=False))
    sample = rows.select(chosen)
    train = EvaluationRows(split.train_users[sample.users], sample.histories, sample.targets)
    figures: dict[str, float | None] = {}
    states: dict[str, StateSpread] = {}
    for part, own, of_folds in ((train, "in_sample", "held_out"), (split.valid, "valid", "held_out_valid")):
        ranks, full = _ranks_and_states(recommender, part)
        figures[own], figures[of_folds], found = _quality(ranks), None, {own: full}
        if recommender.cross_fitted is not None:
            folds = recommender.cross_fitted.of_users(part.users)
            fold_states = torch.zeros_like(full)
            for fold in range(len(recommender.cross_fitted)):
                here = np.flatnonzero(folds == fold)
                ranks[here], fold_states[here] = _ranks_and_states(recommender, part.select(here), fold)
            figures[of_folds], found[of_folds] = _quality(ranks), fold_states
        if len(part) > 1:
            states |= {name: StateSpread.of(last, full) for name, last in found.items()}
    return StateGap(rows=len(train), states=states, **figures)


def _ranks_and_states(model: PackedRecommender, rows: EvaluationRows, fold: int | None = None) -> tuple[Tensor, Tensor]:
    """Ranks [B] and last states float32 [B, D] on the CPU, of a fold or of the model itself."""
    device = model.item_embedding.weight.device
    scorer = model if fold is None or model.cross_fitted is None else model.cross_fitted.models[fold]
    states = [torch.zeros(0, model.state_size)]
    for items, cu_seqlens, _ in row_batches(rows, _BATCH, device):
        states.append(model.last_states(items, cu_seqlens, fold)[0].cpu())
    return evaluate(scorer, rows, batch_size=_BATCH, device=device).ranks, torch.cat(states)


def _quality(ranks: Tensor) -> float | None:
    return RankingMetrics.from_ranks(ranks)[_METRIC].mean if len(ranks) else None
