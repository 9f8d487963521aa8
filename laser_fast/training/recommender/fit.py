"""Fitting an ID-based recommender: windows of the training sequences, epochs, running mean of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from laser_fast.config import RecommenderConfig
from laser_fast.data import PackedSequences
from laser_fast.ops import catalog_cross_entropy
from laser_fast.recommenders.gru4rec import GRU4Rec
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.sasrec import SASRec
from laser_fast.runs.resume import State
from laser_fast.training.optimizer import load_optimizer_state, optimizer_state

_WARMUP_STEPS = 50
_MAX_GRAD_NORM = 5.0
_AVERAGE_DECAY = 0.98  # per step, in the running mean of the weights


@dataclass(frozen=True)
class Windows:
    """Pieces of the training sequences: inputs are all events of a piece but the last, targets all but the first."""

    starts: np.ndarray  # int64 [W], first event of each piece in `items`
    lengths: np.ndarray  # int64 [W], events of each piece, 2..max_length+1
    items: np.ndarray  # int64 [N]

    @classmethod
    def cut(cls, train: PackedSequences, max_length: int) -> Windows:
        """Cut from the newest end, so the oldest piece is the short one; each event but a first is a target once."""
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


def build_recommender(num_items: int, config: RecommenderConfig) -> PackedRecommender:
    """A new model, with weights from torch's global generator."""
    names = ("width", "num_layers", "max_length", "dropout", "state_dropout")
    sizes = {name: getattr(config, name) for name in names}
    if config.kind == "gru4rec":
        return GRU4Rec(num_items, **sizes)
    return SASRec(num_items, num_heads=config.num_heads, **sizes)


class Fitting:
    """A model that is being fitted to windows, and `averaged`, the running mean of its weights.

    Dropout and the order of the windows are drawn from torch's global generator.
    """

    def __init__(self, model: PackedRecommender, windows: Windows, config: RecommenderConfig) -> None:
        self.model, self.windows, self.batch_size = model, windows, config.batch_size
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)
        self.warmup = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / _WARMUP_STEPS))
        self.mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGE_DECAY))
        assert isinstance(self.mean.module, PackedRecommender)  # a copy of `model`
        self.averaged: PackedRecommender = self.mean.module
        self.device: torch.device = model.item_embedding.weight.device

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return int(self.warmup.last_epoch)

    def state(self) -> State:
        """All that the rest of the fitting depends on but the random generators."""
        return State.join(
            model=State(dict(self.model.state_dict())),
            mean=State(dict(self.mean.state_dict())),
            optimizer=optimizer_state(self.optimizer),
            warmup=State(values=self.warmup.state_dict()),
        )

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(state.part("model").tensors)
        self.mean.load_state_dict(state.part("mean").tensors)
        load_optimizer_state(self.optimizer, state.part("optimizer"))
        self.warmup.load_state_dict(state.part("warmup").values)

    def epoch(self) -> float:
        """One pass in random order; the mean loss over all targets, which must be finite."""
        model = self.model.train()
        total, count = 0.0, 0
        order = torch.randperm(len(self.windows.starts)).numpy()
        for start in range(0, len(order), self.batch_size):
            items, cu_seqlens, targets = self.windows.batch(order[start : start + self.batch_size], self.device)
            loss = catalog_cross_entropy(
                model(items, cu_seqlens), model.item_embedding.weight, targets, temperature=1.0, normalize=False
            )
            if not math.isfinite(value := loss.item()):
                raise FloatingPointError(
                    f"train_recommender: the loss must be finite, got {value} at step {self.step}; lower learning_rate"
                )
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
            self.optimizer.step()
            self.warmup.step()
            self.mean.update_parameters(model)
            total += value * targets.numel()
            count += targets.numel()
        return total / count
