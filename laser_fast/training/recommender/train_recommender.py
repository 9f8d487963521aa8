"""Training SASRec or GRU4Rec on the training part of a split, and the models of its folds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from laser_fast.config import RecommenderConfig
from laser_fast.data import Split
from laser_fast.evaluation import evaluate
from laser_fast.evaluation.state_gap import measure_state_gap
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.recommender_files import load_recommender
from laser_fast.runs.resume import State
from laser_fast.training.loop import EarlyStopping
from laser_fast.training.recommender.fit import Fitting, Windows, build_recommender
from laser_fast.training.recommender.fold_models import FULL, folds_of_users, train_folds
from laser_fast.training.recommender.run import RecommenderRun, open_run


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

    What is ranked and kept is a running mean of the weights, which is steadier than the weights of any one step. After
    each epoch all validation rows are ranked; the mean with the best NDCG@10 is kept, and training stops after
    `config.patience` epochs without a better one. The same seed gives the same weights on a CPU with as many threads.
    The global random state is left as it was. With `config.folds` the models of the folds are fitted after it, see
    `train_folds`, which change nothing of it.

    Args:
        split: its training part is learned, its validation rows decide when to stop; its test rows are not touched.
        num_items: I, size of the catalogue.
        config: kind, sizes and schedule, and how many folds.
        seed: of the initial weights, the order of the batches and dropout.
        item_map_hash: hash of the item table, recorded in the checkpoint.
        run_dir: a new folder for configuration, environment, `metrics.jsonl`, a state after every epoch and, at the
            end, the checkpoint.
        resume: go on with the run in `run_dir` from its last whole state; a finished one is only loaded.
        progress: show a bar that counts epochs.
        device: where to train.

    Returns:
        The model with its best weights, in eval mode, `split_hash`, `gap` and, with folds, `cross_fitted` set.

    Raises:
        ValueError: no training sequence has two events, or a fold leaves none; another process writes `run_dir`; the
            run to resume is damaged or began with other settings, data or seed.
        FloatingPointError: the loss is not finite; names the step.
        FileExistsError: `run_dir` holds something, or what is to be resumed lies behind a link.
        FileNotFoundError: the run to resume is missing.
        Interrupted: SIGTERM or SIGINT came while there is a `run_dir`; the epoch is taken again on `resume`.
    """
    windows = Windows.cut(split.train, config.max_length)
    if not len(windows.starts):
        raise ValueError("train_recommender: a training sequence must have two events, got none that long")
    if config.folds:
        folds_of_users(split, config.folds, seed)  # before anything is written, or trained for long
    fingerprint = {"split": split.hash, "item map": item_map_hash, "number of items": num_items, "seed": seed}
    with open_run(run_dir, config, fingerprint, resume=resume) as run:
        if run.finished and run.directory is not None:
            model = load_recommender(run.directory.checkpoint, expected_split_hash=split.hash).to(device)
        else:
            cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
            with torch.random.fork_rng(devices=cuda):
                torch.manual_seed(seed)
                model = build_recommender(num_items, config).to(device)
                model.split_hash, model.item_map_hash = split.hash, item_map_hash
                epochs = _fit(model, windows, split, config, run, progress)
            model.eval()
            if config.folds:
                model.cross_fitted = train_folds(
                    model, split, config, epochs=epochs, seed=seed, run=run, progress=progress
                )
            model.gap = measure_state_gap(model, split, seed=seed)
        run.finish(model)
    return model


def _fit(
    model: PackedRecommender,
    windows: Windows,
    split: Split,
    config: RecommenderConfig,
    run: RecommenderRun,
    progress: bool,
) -> int:
    """Train `model` in place and leave it with its best weights; how many epochs those took."""
    if run.resumed is not None and FULL in run.resumed.values:  # it stands in a fold
        full = run.resumed.part(FULL)
        model.load_state_dict(full.tensors)
        return int(full.values["epochs"])
    fitting, stopping = Fitting(model, windows, config), EarlyStopping(config.patience)
    first, best_weights = 0, _copy(model)
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
                rows = split.valid
                metrics = evaluate(fitting.averaged, rows, device=fitting.device) if len(rows) else None
            quality = metrics["NDCG@10"].mean if metrics is not None else -loss
            run.log(epoch=epoch, loss=loss, **({"valid": metrics.to_dict()["metrics"]} if metrics else {}))
            if stopping.improved(quality, epoch):
                best_weights = _copy(fitting.averaged)
            run.keep("model", epoch + 1, fitting, best=State(best_weights, stopping.values()))
            bar.set_postfix_str(f"loss {loss:.3f}, best NDCG@10 {stopping.best:.4f} in epoch {stopping.best_epoch}")
            bar.update()
    model.load_state_dict(best_weights)
    return stopping.best_epoch + 1


def _copy(model: PackedRecommender) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
