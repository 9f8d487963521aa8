"""The text residual trained by itself, on cached text vectors and without the language model.

`train_text` is the first stage; `fit_text_line` does the same for any split, as a baseline.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from laser_fast.config import OptimizerConfig, StageConfig, resolve_path
from laser_fast.data import EvaluationRows, Split, training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.evaluation import evaluate
from laser_fast.laser.laser_files import find_saved, origin_of
from laser_fast.laser.model import LaserModel
from laser_fast.models.objective import history_pairs, whole_catalog_loss
from laser_fast.models.text_scorers import TextRecommender
from laser_fast.nn.text_residual import TextResidual
from laser_fast.training.epochs import Session, Stage
from laser_fast.training.loop import EarlyStopping, LossFunction, StageTrainer
from laser_fast.training.random_state import forked_generators
from laser_fast.training.training_rows import RowSampler

_LINE_STAGE = StageConfig(epochs=10, rows_per_epoch=16384, batch_size=256)
_LINE_OPTIMIZER = OptimizerConfig(learning_rate=2e-3)
_LINE_HISTORY = 10
_LINE_DROPOUT = 0.2
_METRIC = "NDCG@10"


def train_text(session: Session) -> None:
    """Train users against the whole catalogue, both from frozen vectors through one head; the best epoch is kept.

    The stage stops early by NDCG@10 on the validation rows without the items of each history, which would take the
    first ranks in every epoch alike; the calibrated score weighs them.
    """
    config, model, text = session.config, session.model, session.model.text
    if text is None or not config.training.text.epochs:
        return
    text.fetch_vectors()
    temperature = config.objective.temperature
    trained = _Trained(text, model.popularity_weight)
    stopping, best = EarlyStopping(config.training.text.patience), _BestWeights(trained)

    def conclude(epoch: int, values: dict[str, Any]) -> None:
        with session.processes.apart():
            own = _quality(text, temperature, session.inputs.split.valid)
        value = session.processes.of_first(own)
        if improved := stopping.improved(value, epoch):
            best.keep()
        quality = {f"validation_{_METRIC}_without_history": value}
        session.run.log(stage="text", epoch=epoch, best=improved, **quality, **values)
        if session.progress:
            print(f"text epoch {epoch + 1}: validation {_METRIC} without the history {value:.4f}", flush=True)

    Stage(
        session=session,
        name="text",
        title="text",
        settings=config.training.text,
        optimizer=config.training.optimizer_at(config.training.text_optimizer),
        seed=config.training.seed + 3,
        modules=trained,
        loss_function=_loss(
            text, model.objective.temperature, model.popularity, mask_history=model.objective.mask_history
        ),
        stopping=stopping,
        conclude=conclude,
        heads=best,
    ).train()
    best.put_back()
    trained.zero_grad(set_to_none=True)


def initialize_text(model: LaserModel, folder: str) -> None:
    """Begin with the vectors and the trained residual of the saved model in `folder`, which must fit."""
    saved = find_saved(resolve_path(folder))
    if saved is None:
        raise FileNotFoundError(f"initialize_text: the folder must hold a saved Laser, got {folder!r}")
    own, others = origin_of(model).config.text.model_dump(), saved.description.model.text.model_dump()
    free = {"initialize_from", "item_side", "dropout"}
    differing = [name for name, value in own.items() if name not in free and others[name] != value]
    if saved.description.item_map_hash != origin_of(model).items.hash():
        differing.append("catalogue")
    if differing:
        raise ValueError(
            f"initialize_text: {folder!r} must have this model's text settings and catalogue, got other "
            + ", ".join(differing)
        )
    saved.refuse_another_base(model)
    saved.put_text_into(model)


def fit_text_line(
    vectors: Tensor,
    split: Split,
    counts: Tensor,
    *,
    temperature: float = 0.05,
    stage: StageConfig = _LINE_STAGE,
    seed: int = 0,
) -> TextRecommender:
    """Train recency weights and one linear head on frozen text vectors, as Laser's text stage does.

    A recommender that runs a language model over histories has to beat this baseline. The weights of the epoch with the
    best NDCG@10 on the validation rows, histories left out, are kept.

    Args:
        vectors: float32 [I, d], unit rows (`centred`), on the device to train on.
        split: its training rows are learned, its validation rows choose the epoch.
        counts: int64 [I], events of each item in the training part.
        temperature: tau.
        stage: the schedule.
        seed: of the order of rows and of dropout; the global random state is left as it was.

    Returns:
        The recommender, without repeat or popularity terms, as `fit_calibration` wants it.
    """
    rows, device = training_rows(split.train, _LINE_HISTORY), vectors.device
    with forked_generators(device):
        torch.manual_seed(seed)
        text = TextResidual(vectors.shape[0], vectors.shape[1], max_history=_LINE_HISTORY, dropout=_LINE_DROPOUT)
        trained = _Trained(text, nn.Parameter(torch.zeros(()))).to(device)
        weight = trained.popularity_weight
        assert weight is not None
        text.set_vectors(vectors)
        if len(rows):
            popularity = weight, torch.log1p(counts.float()).to(device)
            loss = _loss(text, temperature, lambda: popularity, mask_history=True)
            sampler = RowSampler(len(rows), min(len(rows), stage.rows_per_epoch or len(rows)), seed)
            batch_size = stage.batch_size or len(rows)
            num_batches = sampler.num_batches(batch_size)
            trainer = StageTrainer(Accelerator(), trained, _LINE_OPTIMIZER, stage.epochs * num_batches)
            stopping, best = EarlyStopping(stage.patience), _BestWeights(trained)
            for epoch in range(stage.epochs):
                batches = (_batch(rows.select(chosen)) for chosen in sampler.batches(epoch, batch_size))
                trainer.run_epoch(batches, num_batches, loss, title="cached text", progress=False)
                if stopping.improved(_quality(text, temperature, split.valid), epoch):
                    best.keep()
                if stopping.stop:
                    break
            best.put_back()
    return TextRecommender(text.eval(), temperature)


def _batch(rows: EvaluationRows) -> PackedBatch:
    """Histories and targets without text."""
    items, bounds = torch.from_numpy(rows.histories.items), torch.from_numpy(rows.histories.cu_seqlens)
    nothing = torch.empty(0, dtype=torch.int64), torch.zeros(len(rows) + 1, dtype=torch.int32)
    targets = torch.from_numpy(rows.targets)
    return PackedBatch(items, bounds, *nothing, targets=targets, text_items=items, text_cu_seqlens=bounds)


def _loss(
    text: TextResidual,
    temperature: float,
    popularity: Callable[[], tuple[Tensor, Tensor] | None],
    *,
    mask_history: bool,
) -> LossFunction:
    """Cross-entropy of users against the whole catalogue, as in stage 2 but by the residual alone."""

    def loss(batch: PackedBatch) -> dict[str, Tensor]:
        assert batch.targets is not None and batch.text_items is not None and batch.text_cu_seqlens is not None
        users = text.users(batch.text_items, batch.text_cu_seqlens)
        ignored = history_pairs(batch) if mask_history else None
        other = {"ignored": ignored, "popularity": popularity()}
        return {"loss": whole_catalog_loss(users, text.items(), batch.targets, temperature, **other)}

    return loss


class _Trained(nn.Module):
    """The residual, and the weight of popularity where there is one."""

    def __init__(self, text: TextResidual, popularity_weight: nn.Parameter | None) -> None:
        super().__init__()
        self.text = text
        self.popularity_weight = popularity_weight


class _BestWeights(nn.Module):
    """The weights of the best epoch so far; a module, so that a state holds them."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self._trained = [trained]  # in a list: its parameters are not this module's
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        for name, tensor in self._trained[0].state_dict().items():
            self.register_buffer(name.replace(".", "_"), tensor.clone())

    @torch.no_grad()
    def put_back(self) -> None:
        for name, tensor in self._trained[0].state_dict().items():
            tensor.copy_(self.get_buffer(name.replace(".", "_")))


def _quality(text: TextResidual, temperature: float, rows: EvaluationRows) -> float:
    """NDCG@10 of the residual alone, the items of each history ranked last; 0 without rows."""
    if not len(rows):
        return 0.0
    scorer = TextRecommender(text, temperature, without_history=True)
    return evaluate(scorer, rows, device=text.head.weight.device)[_METRIC].mean
