"""The line of cached vectors: the text residual trained by itself, for any model and without reading a text again."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from laser_fast.config import OptimizerConfig, StageConfig
from laser_fast.data import EvaluationRows, Split, training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.models.text_recommender import TextRecommender
from laser_fast.nn.text_residual import TextResidual
from laser_fast.training.loop import EarlyStopping, StageTrainer
from laser_fast.training.row_sampler import RowSampler
from laser_fast.training.text_stage import BestWeights, residual_loss, text_quality

STAGE = StageConfig(epochs=10, rows_per_epoch=16384, batch_size=256)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3)
_MAX_HISTORY = 10
_DROPOUT = 0.2


class _Line(nn.Module):
    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.text = TextResidual(vectors.shape[0], vectors.shape[1], max_history=_MAX_HISTORY, dropout=_DROPOUT)
        self.popularity_weight = nn.Parameter(torch.zeros(()))
        self.to(vectors.device)
        self.text.set_vectors(vectors)


def fit_text_line(
    vectors: Tensor,
    split: Split,
    counts: Tensor,
    *,
    temperature: float = 0.05,
    stage: StageConfig = STAGE,
    optimizer: OptimizerConfig = OPTIMIZER,
    seed: int = 0,
    progress: bool = False,
) -> TextRecommender:
    """Train recency weights and one linear head on frozen text vectors, as Laser's text stage does.

    What any recommender that runs a language model over histories has to beat. The weights of the epoch with the best
    NDCG@10 on the validation rows, histories left out, are kept.

    Args:
        vectors: float32 [I, d], unit rows (`centred`), on the device to train on.
        split: its training rows are learned from, its validation rows choose the epoch.
        counts: int64 [I], events of each item in the training part.
        temperature: tau.
        stage, optimizer: the schedule.
        seed: of the order of rows and of dropout; the global random state is left as it was.
        progress: show bars.

    Returns:
        The recommender, without repeat or popularity terms, as `search_calibration` wants it.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    with torch.random.fork_rng(devices=[vectors.device] if vectors.device.type == "cuda" else []):
        torch.manual_seed(seed)
        line = _Line(vectors)
        _fit(line, split, counts, (temperature, stage, optimizer), seed, progress)
    return TextRecommender(line.text.eval(), temperature)


def _fit(
    line: _Line,
    split: Split,
    counts: Tensor,
    how: tuple[float, StageConfig, OptimizerConfig],
    seed: int,
    progress: bool,
) -> None:
    """Train in place and leave the weights of the best epoch."""
    (temperature, stage, optimizer), text = how, line.text
    rows = training_rows(split.train, _MAX_HISTORY)
    if not len(rows):
        return
    size = stage.batch_size or len(rows)
    sampler = RowSampler(len(rows), min(len(rows), stage.rows_per_epoch or len(rows)), seed)
    num_batches = sampler.num_batches(size)
    popularity = line.popularity_weight, torch.log1p(counts.float()).to(line.popularity_weight.device)

    def loss(batch: PackedBatch) -> dict[str, Tensor]:
        return {"loss": residual_loss(text, batch, temperature, True, popularity)}

    trainer = StageTrainer(Accelerator(), line, optimizer, stage.epochs * num_batches)
    stopping, best = EarlyStopping(stage.patience), BestWeights(line)
    for epoch in range(stage.epochs):
        batches = (_batch(rows.select(chosen)) for chosen in sampler.batches(epoch, size))
        trainer.run_epoch(batches, num_batches, loss, title=f"cached text, epoch {epoch + 1}", progress=progress)
        if stopping.improved(text_quality(text, temperature, split.valid), epoch):
            best.keep()
        if stopping.stop:
            break
    best.put_back()


def _batch(rows: EvaluationRows) -> PackedBatch:
    """Histories and targets without a word of text."""
    items, bounds = torch.from_numpy(rows.histories.items), torch.from_numpy(rows.histories.cu_seqlens)
    nothing = torch.empty(0, dtype=torch.int64), torch.zeros(len(rows) + 1, dtype=torch.int32)
    targets = torch.from_numpy(rows.targets)
    return PackedBatch(items, bounds, *nothing, targets=targets, text_items=items, text_cu_seqlens=bounds)
