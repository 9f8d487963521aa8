"""Training SASRec or GRU4Rec on the training part of a split, and then the models of its folds."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from laser_fast.config import RecommenderConfig
from laser_fast.data import Split
from laser_fast.evaluation import evaluate
from laser_fast.evaluation.state_gap import measure_state_gap
from laser_fast.recommenders.packed_recommender import CrossFitted, PackedRecommender, assign_folds
from laser_fast.recommenders.recommender_files import load_recommender
from laser_fast.runs.resume import State
from laser_fast.training.loop import EarlyStopping
from laser_fast.training.random_state import forked_generators
from laser_fast.training.recommender.fit import Fitting, Windows, build_recommender
from laser_fast.training.recommender.run import RecommenderRun, open_recommender_run

_FULL = "full"  # part of a state of a fold: the finished full model and the epochs it took


def train_recommender(
    split: Split,
    num_items: int,
    config: RecommenderConfig,
    *,
    seed: int,
    item_map_hash: str | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> PackedRecommender:
    """Minimise the mean cross-entropy of the next item over the whole catalogue, at every position of `split.train`.

    A running mean of the weights is ranked and kept, as it is steadier than the weights of a single step. All
    validation rows are ranked after each epoch; the mean with the best NDCG@10 is kept, and training stops after
    `config.patience` epochs without a better one. With `config.folds` the models of the folds are fitted after it
    (`train_folds`), which changes nothing of it. The same seed gives the same weights on a CPU with as many threads.
    The global random state is left as it was.

    Args:
        split: its training part is learned, its validation rows decide when to stop; its test rows are not touched.
        num_items: I, size of the catalogue.
        seed: of the initial weights, the order of the batches and dropout.
        item_map_hash: hash of the item table, recorded in the checkpoint.
        run_dir: a new folder for configuration, environment, `metrics.jsonl`, a state after every epoch and, at the
            end, the checkpoint; None = nothing is written.
        resume: go on with the run in `run_dir` from its last whole state; a finished one is only loaded.

    Returns:
        The model with its best weights, in eval mode, `split_hash`, `gap` and, with folds, `cross_fitted` set.

    Raises:
        ValueError: no training sequence has two events, or a fold leaves none; another process writes `run_dir`; the
            run to resume is damaged or began with other settings, data or seed.
        FloatingPointError: the loss is not finite.
        FileExistsError: `run_dir` holds something, or a link in the run to resume.
        FileNotFoundError: the run to resume is missing.
        Interrupted: SIGTERM or SIGINT came while there is a `run_dir`; the epoch is taken again on `resume`.
    """
    windows = Windows.cut(split.train, config.max_length)
    if not len(windows.starts):
        raise ValueError("train_recommender: a training sequence must have two events, got none that long")
    if config.folds:
        _folds_of_users(split, config.folds, seed)  # before anything is written, or trained for long
    fingerprint = {"split": split.hash, "item map": item_map_hash, "number of items": num_items, "seed": seed}
    with open_recommender_run(run_dir, config, fingerprint, resume=resume) as run:
        if run.checkpoint is not None:
            model = load_recommender(run.checkpoint, expected_split_hash=split.hash).to(device)
        else:
            with forked_generators(torch.device(device)):
                torch.manual_seed(seed)
                model = build_recommender(num_items, config).to(device)
                model.split_hash, model.item_map_hash = split.hash, item_map_hash
                epochs = _fit(Fitting(model, windows, config), split, config, run, progress)
            model.eval()
            if config.folds:
                model.cross_fitted = train_folds(
                    model, split, config, epochs=epochs, seed=seed, run=run, progress=progress
                )
            model.gap = measure_state_gap(model, split, seed=seed)
        run.finish(model)
    return model


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

    User u is in fold permutation(u) mod K. A fold begins with the weights that `model` began with and learns from the
    sequences of the other folds for a given number of epochs, so that neither its own users nor their validation rows
    have a say in its weights. Its states are rotated onto those of `model`, and scaled to their length, on the
    sequences both have learned from.

    Args:
        model: fitted on all of `split.train`.
        epochs: passes over the sequences of the other folds; those of `model` up to its best.
        seed: of the folds, and the one `model` was trained with.
        run: where the loss of every epoch is logged, with the fold, and from which the folds go on; None = nowhere.
    """
    user_folds = _folds_of_users(split, config.folds, seed)
    run = RecommenderRun() if run is None else run
    models, bases, done = [], [], {_FULL: State(dict(model.state_dict()), {"epochs": epochs})}
    with forked_generators(model.item_embedding.weight.device):
        for fold in range(config.folds):
            windows = Windows.cut(split.train.select(user_folds[split.train_users] != fold), config.max_length)
            torch.manual_seed(seed)
            twin, name = model.twin().to(model.item_embedding.weight.device), f"fold{fold}"
            torch.manual_seed(int(np.random.SeedSequence([seed, 1 + fold]).generate_state(1)[0]))
            if run.resumed is not None and name in run.resumed.values:
                twin.load_state_dict(run.resumed.part(name).tensors)
            else:
                fitting = Fitting(twin, windows, config)
                state = run.take_up(name, fitting)
                first = 0 if state is None else state.values["position"]["epoch"]
                title = f"{type(twin).__name__} without fold {fold + 1} of {config.folds}"
                with tqdm(total=epochs, initial=first, desc=title, unit="epoch", disable=not progress) as bar:
                    for epoch in range(first, epochs):
                        with run.interruption.at_once():
                            loss = fitting.epoch()
                        run.log(fold=fold, epoch=epoch, loss=loss)
                        run.keep(name, epoch + 1, fitting, **done)  # with what the later folds need
                        bar.update()
                twin.load_state_dict(fitting.averaged.state_dict())
            models.append(twin.eval())
            done[name] = State(dict(twin.state_dict()))
            bases.append(_rotation(model, twin, windows, config.batch_size))
    return CrossFitted(models, user_folds, split.hash, torch.stack(bases))


def _fit(fitting: Fitting, split: Split, config: RecommenderConfig, run: RecommenderRun, progress: bool) -> int:
    """Leave the model with its best weights; the number of epochs those took."""
    model, valid = fitting.model, split.valid
    if run.resumed is not None and _FULL in run.resumed.values:  # it stands in a fold
        full = run.resumed.part(_FULL)
        model.load_state_dict(full.tensors)
        return int(full.values["epochs"])
    stopping = EarlyStopping(config.patience)
    first, best_weights = 0, copy.deepcopy(model.state_dict())
    if (state := run.take_up("model", fitting)) is not None:
        first, best_weights = state.values["position"]["epoch"], state.part("best").tensors
        stopping.put_back(state.part("best").values)
    title = type(model).__name__
    with tqdm(total=config.epochs, initial=first, desc=title, unit="epoch", disable=not progress) as bar:
        for epoch in range(first, config.epochs):
            if stopping.stop:
                break
            with run.interruption.at_once():
                loss = fitting.epoch()
                metrics = evaluate(fitting.averaged, valid, device=fitting.device) if len(valid) else None
            quality = metrics["NDCG@10"].mean if metrics is not None else -loss
            run.log(epoch=epoch, loss=loss, **({"valid": metrics.to_dict()["metrics"]} if metrics else {}))
            if stopping.improved(quality, epoch):
                best_weights = copy.deepcopy(fitting.averaged.state_dict())
            run.keep("model", epoch + 1, fitting, best=State(best_weights, stopping.values()))
            bar.set_postfix_str(f"loss {loss:.3f}, best NDCG@10 {stopping.best:.4f} in epoch {stopping.best_epoch}")
            bar.update()
    model.load_state_dict(best_weights)
    return stopping.best_epoch + 1


def _folds_of_users(split: Split, num_folds: int, seed: int) -> np.ndarray:
    """The fold of every user, int8 [U]; refuses folds that leave nothing to learn from."""
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


def _rotation(model: PackedRecommender, twin: PackedRecommender, windows: Windows, batch_size: int) -> Tensor:
    """The rotation of the states of `twin` onto those of `model`, times the ratio of their mean lengths: [D, D].

    Orthogonal Procrustes over all windows (Schoenemann 1966), summed in float64.
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
