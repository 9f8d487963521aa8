"""Fitting the models of the folds: each from scratch, on the training sequences of the other folds' users."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from laser_fast.config import RecommenderConfig
from laser_fast.data import Split
from laser_fast.models.cross_fitted import CrossFitted, assign_folds, fold_model
from laser_fast.models.packed_recommender import PackedRecommender
from laser_fast.training.recommender_fit import Fitting, Windows
from laser_fast.training.run_directory import RunDirectory


def train_folds(
    model: PackedRecommender,
    split: Split,
    config: RecommenderConfig,
    *,
    epochs: int,
    seed: int,
    run: RunDirectory | None = None,
    progress: bool = True,
) -> CrossFitted:
    """The models of `config.folds` folds beside a finished `model`.

    User u is in fold permutation(u) mod K, by the seed. With `config.fold_items` "shared" a fold's model reads the item
    embeddings of `model` and learns everything else; with "own" it learns those too. It is fitted for a given number of
    epochs and kept as it then is: nothing of its own users, nor their validation rows, has a say in it. The embeddings
    that are shared have seen all users. The same seed gives the same weights on a CPU with as many threads. The global
    random state is left as it was.

    Args:
        model: fitted on all of `split.train`.
        epochs: passes over the sequences of the other folds; those of `model` up to its best.
        run: where the loss of every epoch is logged, with the fold.

    Raises:
        ValueError: a fold leaves no sequence of two events to learn from.
        FloatingPointError: the loss is not finite; names the step.
    """
    everyone = [split.train_users, split.valid.users, split.test.users]
    num_users = 1 + max(int(users.max(initial=-1)) for users in everyone)
    user_folds = assign_folds(num_users, config.folds, seed)
    device = model.item_embedding.weight.device
    models = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for fold in range(config.folds):
            windows = Windows.cut(split.train.select(user_folds[split.train_users] != fold), config.max_length)
            if not len(windows.starts):
                raise ValueError(
                    f"train_folds: folds must each leave a sequence of two events to learn from, got fold {fold} of "
                    f"{config.folds} that leaves none"
                )
            torch.manual_seed(int(np.random.SeedSequence([seed, 1 + fold]).generate_state(1)[0]))
            models.append(_train_fold(model, windows, config, fold, epochs, run=run, progress=progress))
    return CrossFitted(models, user_folds, config.fold_items, split.hash)


def _train_fold(
    model: PackedRecommender,
    windows: Windows,
    config: RecommenderConfig,
    fold: int,
    epochs: int,
    *,
    run: RunDirectory | None,
    progress: bool,
) -> PackedRecommender:
    """The model of one fold, in evaluation mode."""
    table = model.item_embedding.weight
    learned = table.requires_grad
    twin = fold_model(model, config.fold_items).to(table.device)
    try:
        twin.item_embedding.weight.requires_grad_(config.fold_items == "own")
        fitting = Fitting(twin, windows, config)
        title = f"{type(model).__name__} without fold {fold + 1} of {config.folds}"
        for epoch in tqdm(range(epochs), desc=title, unit="epoch", disable=not progress):
            loss = fitting.epoch()
            if run is not None:
                run.log(fold=fold, epoch=epoch, loss=loss)
    finally:
        table.requires_grad_(learned)
    own = {name: value for name, value in fitting.averaged.state_dict().items() if _is_own(name, config)}
    twin.load_state_dict(own, strict=False)  # the shared table stays the full model's, to the last bit
    return twin.eval()


def _is_own(name: str, config: RecommenderConfig) -> bool:
    return config.fold_items == "own" or not name.startswith("item_embedding.")
