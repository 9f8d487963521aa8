"""Training SASRec or GRU4Rec on the training part of a split, and the models of its folds."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from laser_fast.config import RecommenderConfig
from laser_fast.data import Split
from laser_fast.evaluation import evaluate
from laser_fast.evaluation.state_gap import measure_state_gap
from laser_fast.models.packed_recommender import PackedRecommender
from laser_fast.models.recommender_files import save_recommender
from laser_fast.training.fold_models import train_folds
from laser_fast.training.recommender_fit import Fitting, Windows, build_recommender
from laser_fast.training.run_directory import RunDirectory, describe_environment


def train_recommender(
    split: Split,
    num_items: int,
    config: RecommenderConfig,
    *,
    seed: int,
    item_map_hash: str | None = None,
    run_dir: str | Path | None = None,
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
        run_dir: a new folder for configuration, environment, `metrics.jsonl` and, at the end, the checkpoint.
        progress: show a bar that counts epochs.
        device: where to train.

    Returns:
        The model with its best weights, in eval mode, `split_hash`, `gap` and, with folds, `cross_fitted` set.

    Raises:
        ValueError: no training sequence has two events, or a fold leaves none.
        FloatingPointError: the loss is not finite; names the step.
        FileExistsError: `run_dir` exists and is not empty.
    """
    windows = Windows.cut(split.train, config.max_length)
    if not len(windows.starts):
        raise ValueError("train_recommender: a training sequence must have two events, got none that long")
    run = RunDirectory(run_dir, config) if run_dir is not None else None
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model = build_recommender(num_items, config).to(device)
        epochs = _fit(model, windows, split, config, run, progress)
    model.split_hash = split.hash
    model.item_map_hash = item_map_hash
    model.eval()
    if config.folds:
        model.cross_fitted = train_folds(model, split, config, epochs=epochs, seed=seed, run=run, progress=progress)
    model.gap = measure_state_gap(model, split, seed=seed)
    if run is not None:
        save_recommender(model, run.checkpoint, environment=describe_environment())
    return model


def _fit(
    model: PackedRecommender,
    windows: Windows,
    split: Split,
    config: RecommenderConfig,
    run: RunDirectory | None,
    progress: bool,
) -> int:
    """Train `model` in place and leave it with its best weights; how many epochs those took."""
    device = model.item_embedding.weight.device
    fitting = Fitting(model, windows, config)
    best_quality, best_epoch, best_weights = -math.inf, -1, _copy(model)
    with tqdm(total=config.epochs, desc=type(model).__name__, unit="epoch", disable=not progress) as bar:
        for epoch in range(config.epochs):
            loss = fitting.epoch()
            metrics = evaluate(fitting.averaged, split.valid, device=device) if len(split.valid) else None
            quality = metrics["NDCG@10"].mean if metrics is not None else -loss
            if run is not None:
                run.log(epoch=epoch, loss=loss, **({"valid": metrics.to_dict()["metrics"]} if metrics else {}))
            if quality > best_quality:
                best_quality, best_epoch, best_weights = quality, epoch, _copy(fitting.averaged)
            bar.set_postfix_str(f"loss {loss:.3f}, best NDCG@10 {best_quality:.4f} in epoch {best_epoch}")
            bar.update()
            if epoch - best_epoch >= config.patience:
                break
    model.load_state_dict(best_weights)
    return best_epoch + 1


def _copy(model: PackedRecommender) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
