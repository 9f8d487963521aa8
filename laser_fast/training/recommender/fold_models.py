"""Fitting the models of the folds: each from scratch, on the training sequences of the other folds' users."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from laser_fast.config import RecommenderConfig
from laser_fast.data import Split
from laser_fast.recommenders.packed_recommender import CrossFitted, PackedRecommender, assign_folds
from laser_fast.runs.resume import State
from laser_fast.training.recommender.fit import Fitting, Windows
from laser_fast.training.recommender.run import RecommenderRun

FULL = "full"
"""Part of a state of a fold: the finished full model and the epochs it took."""


def train_folds(
    model: PackedRecommender,
    split: Split,
    config: RecommenderConfig,
    *,
    epochs: int,
    seed: int,
    run: RecommenderRun | None = None,
    progress: bool = True,
) -> CrossFitted:
    """The models of `config.folds` folds beside a finished `model`.

    User u is in fold permutation(u) mod K, by the seed. A fold begins with the weights that `model` began with, and
    learns all of them; its states are rotated onto those of `model`, and scaled to their length, on the sequences both
    have learned from.

    A fold is fitted for a given number of epochs and kept as it then is: nothing of its own users, nor their validation
    rows, has a say in its weights, but in the rotation by the full model's states of others. The
    same seed gives the same weights on a CPU with as many threads. The global random state is left as it was.

    Args:
        model: fitted on all of `split.train`.
        seed: of the folds, and the one `model` was trained with.
        epochs: passes over the sequences of the other folds; those of `model` up to its best.
        run: where the loss of every epoch is logged, with the fold, and from which the folds go on; None = nowhere.

    Raises:
        ValueError: a fold leaves no sequence of two events to learn from.
        FloatingPointError: the loss is not finite; names the step.
    """
    user_folds = folds_of_users(split, config.folds, seed)
    device = model.item_embedding.weight.device
    run = RecommenderRun() if run is None else run
    models, bases, done = [], [], {FULL: State(dict(model.state_dict()), {"epochs": epochs})}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for fold in range(config.folds):
            windows = Windows.cut(split.train.select(user_folds[split.train_users] != fold), config.max_length)
            twin, name = _start(model, seed, fold), f"fold{fold}"
            if run.resumed is not None and name in run.resumed.values:
                twin.load_state_dict(run.resumed.part(name).tensors)
            else:
                title = f"{type(twin).__name__} without fold {fold + 1} of {config.folds}"
                fitting = Fitting(twin, windows, config)
                with tqdm(total=epochs, desc=title, unit="epoch", disable=not progress) as bar:
                    _train_fold(fitting, fold, epochs, run, done, bar)
            models.append(twin.eval())
            done[name] = State(dict(twin.state_dict()))
            bases.append(_rotation(model, twin, windows, config.batch_size))
    return CrossFitted(models, user_folds, split.hash, torch.stack(bases))


def folds_of_users(split: Split, num_folds: int, seed: int) -> np.ndarray:
    """The fold of every user of a split, by the index of the user: int8 [U].

    Raises:
        ValueError: a fold leaves no sequence of two events to learn from.
    """
    everyone = [split.train_users, split.valid.users, split.test.users]
    folds = assign_folds(1 + max(int(users.max(initial=-1)) for users in everyone), num_folds, seed)
    learned = folds[split.train_users[np.diff(split.train.cu_seqlens) >= 2]]
    for fold in range(num_folds):
        if (learned == fold).all():
            raise ValueError(
                f"train_folds: folds must each leave a sequence of two events to learn from, got fold {fold} of "
                f"{num_folds} that leaves none; set fewer folds, or 0 for none"
            )
    return folds


def _start(model: PackedRecommender, seed: int, fold: int) -> PackedRecommender:
    """The model of a fold before its first step; torch's generator stands where the fitting is to begin."""
    torch.manual_seed(seed)
    twin = model.twin().to(model.item_embedding.weight.device)
    torch.manual_seed(int(np.random.SeedSequence([seed, 1 + fold]).generate_state(1)[0]))
    return twin


def _train_fold(
    fitting: Fitting, fold: int, epochs: int, run: RecommenderRun, done: dict[str, State], bar: tqdm[Any]
) -> None:
    """Fit the model of one fold in place, from where the run stands; `done` is what later folds will need of before."""
    name = f"fold{fold}"
    state = run.take_up(name, fitting)
    first = 0 if state is None else state.values["position"]["epoch"]
    bar.update(first)
    for epoch in range(first, epochs):
        with run.interruption.at_once():
            loss = fitting.epoch()
        run.log(fold=fold, epoch=epoch, loss=loss)
        run.keep(name, epoch + 1, fitting, **done)
        bar.update()
    fitting.model.load_state_dict(fitting.averaged.state_dict())


def _rotation(model: PackedRecommender, twin: PackedRecommender, windows: Windows, batch_size: int) -> Tensor:
    """The rotation that brings the states of `twin` closest to those of `model` over all windows, times the ratio of
    their mean lengths: float32 [D, D].

    Source: orthogonal Procrustes, Schoenemann 1966; summed in float64.
    """
    device = model.item_embedding.weight.device
    cross = torch.zeros(model.state_size, model.state_size, dtype=torch.float64, device=device)
    length = other = 0.0
    for start in range(0, len(windows.starts), batch_size):
        rows = np.arange(start, min(start + batch_size, len(windows.starts)))
        items, cu_seqlens, _ = windows.batch(rows, device)
        own, full = twin.states(items, cu_seqlens).double(), model.states(items, cu_seqlens).double()
        cross += own.T @ full
        length += float(own.norm(dim=1).sum())
        other += float(full.norm(dim=1).sum())
    left, _, right = torch.linalg.svd(cross)
    return (left @ right * (other / length)).float()
