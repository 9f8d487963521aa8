"""Training SASRec or GRU4Rec on the training part of a split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from laser_fast.config import RecommenderConfig
from laser_fast.data import PackedSequences, Split
from laser_fast.evaluation import evaluate
from laser_fast.models.gru4rec import GRU4Rec
from laser_fast.models.packed_recommender import PackedRecommender
from laser_fast.models.recommender_files import save_recommender
from laser_fast.models.sasrec import SASRec
from laser_fast.ops import catalog_cross_entropy
from laser_fast.training.run_directory import RunDirectory, describe_environment

_WARMUP_STEPS = 50
_MAX_GRAD_NORM = 5.0
_AVERAGE_DECAY = 0.98  # of the running mean of the weights, per step


@dataclass(frozen=True)
class _Windows:
    """Pieces of the training sequences; inputs are all events of a piece but the last, targets all but the first."""

    starts: np.ndarray  # int64 [W], first event of each piece in `items`
    lengths: np.ndarray  # int64 [W], events of each piece, 2..max_length+1
    items: np.ndarray  # int64 [N]

    @classmethod
    def cut(cls, train: PackedSequences, max_length: int) -> _Windows:
        """Cut from the newest end: the oldest piece is the short one. Each event but a first is a target once."""
        starts, lengths = [], []
        for first, end in zip(train.cu_seqlens[:-1].tolist(), train.cu_seqlens[1:].tolist(), strict=True):
            while end - first > 1:
                start = max(first, end - max_length - 1)
                starts.append(start)
                lengths.append(end - start)
                end = start + 1
        return cls(np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64), train.items)

    def batch(self, rows: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """(items [N] int64, cu_seqlens [B+1] int32, targets [N] int64) of the pieces `rows`."""
        counts = self.lengths[rows] - 1
        ends = np.cumsum(counts)
        places = np.arange(ends[-1]) + np.repeat(self.starts[rows] - (ends - counts), counts)
        return (
            torch.from_numpy(self.items[places]).to(device),
            torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device),
            torch.from_numpy(self.items[places + 1]).to(device),
        )


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
    The global random state is left as it was.

    Args:
        split: its training part is learned, its validation rows decide when to stop; its test rows are not touched.
        num_items: I, size of the catalogue.
        config: kind, sizes and schedule.
        seed: of the initial weights, the order of the batches and dropout.
        item_map_hash: hash of the item table, recorded in the checkpoint.
        run_dir: a new folder for configuration, environment, `metrics.jsonl` and, at the end, the checkpoint.
        progress: show a bar that counts epochs.
        device: where to train.

    Returns:
        The model with its best weights, in eval mode, `split_hash` set.

    Raises:
        ValueError: no training sequence has two events.
        FloatingPointError: the loss is not finite; names the step.
        FileExistsError: `run_dir` exists and is not empty.
    """
    windows = _Windows.cut(split.train, config.max_length)
    if not len(windows.starts):
        raise ValueError("train_recommender: a training sequence must have two events, got none that long")
    run = RunDirectory(run_dir, config) if run_dir is not None else None
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model = _build(num_items, config).to(device)
        _fit(model, windows, split, config, run, progress)
    model.split_hash = split.hash
    model.item_map_hash = item_map_hash
    model.eval()
    if run is not None:
        save_recommender(model, run.checkpoint, environment=describe_environment())
    return model


def _build(num_items: int, config: RecommenderConfig) -> PackedRecommender:
    """A new model of the kind and sizes of `config`."""
    if config.kind == "gru4rec":
        return GRU4Rec(
            num_items,
            width=config.width,
            hidden_width=config.hidden_width,
            num_layers=config.num_layers,
            max_length=config.max_length,
            dropout=config.dropout,
            state_dropout=config.state_dropout,
        )
    return SASRec(
        num_items,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        max_length=config.max_length,
        dropout=config.dropout,
        state_dropout=config.state_dropout,
    )


def _fit(
    model: PackedRecommender,
    windows: _Windows,
    split: Split,
    config: RecommenderConfig,
    run: RunDirectory | None,
    progress: bool,
) -> None:
    """Train `model` in place and leave it with its best weights."""
    device = model.item_embedding.weight.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / _WARMUP_STEPS))
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGE_DECAY))
    averaged = mean.module
    assert isinstance(averaged, PackedRecommender)  # a copy of `model`
    best_quality, best_epoch, best_weights = -math.inf, -1, _copy(model)
    with tqdm(total=config.epochs, desc=type(model).__name__, unit="epoch", disable=not progress) as bar:
        for epoch in range(config.epochs):
            loss = _train_epoch(model, mean, windows, config.batch_size, optimizer, warmup)
            metrics = evaluate(averaged, split.valid, device=device) if len(split.valid) else None
            quality = metrics["NDCG@10"].mean if metrics is not None else -loss
            if run is not None:
                run.log(epoch=epoch, loss=loss, **({"valid": metrics.to_dict()["metrics"]} if metrics else {}))
            if quality > best_quality:
                best_quality, best_epoch, best_weights = quality, epoch, _copy(averaged)
            bar.set_postfix_str(f"loss {loss:.3f}, best NDCG@10 {best_quality:.4f} in epoch {best_epoch}")
            bar.update()
            if epoch - best_epoch >= config.patience:
                break
    model.load_state_dict(best_weights)


def _train_epoch(
    model: PackedRecommender,
    mean: AveragedModel,
    windows: _Windows,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    warmup: torch.optim.lr_scheduler.LambdaLR,
) -> float:
    """One pass in random order, `mean` following the weights; the mean loss over all targets."""
    model.train()
    total, count = 0.0, 0
    order = torch.randperm(len(windows.starts)).numpy()
    for start in range(0, len(order), batch_size):
        items, cu_seqlens, targets = windows.batch(
            order[start : start + batch_size], model.item_embedding.weight.device
        )
        loss = catalog_cross_entropy(
            model(items, cu_seqlens), model.item_embedding.weight, targets, temperature=1.0, normalize=False
        )
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(
                f"train_recommender: the loss must be finite, got {value} at step {warmup.last_epoch}; "
                "lower learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        warmup.step()
        mean.update_parameters(model)
        total += value * targets.numel()
        count += targets.numel()
    return total / count


def _copy(model: PackedRecommender) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
