"""The stage before all others: the text residual alone, on cached text vectors and without the language model."""

from typing import Any

import torch
from torch import Tensor, nn

from laser_fast.config import resolve_path
from laser_fast.data import EvaluationRows
from laser_fast.data.batches import PackedBatch
from laser_fast.evaluation import evaluate
from laser_fast.laser.laser_files import find_saved, item_map_hash, origin_of
from laser_fast.laser.model import LaserModel
from laser_fast.models.objective import history_pairs, whole_catalog_loss
from laser_fast.models.text_recommender import TextRecommender
from laser_fast.nn.text_residual import TextResidual
from laser_fast.training.epochs import Run, Stage, train_epochs
from laser_fast.training.loop import EarlyStopping, LossFunction, StageTrainer
from laser_fast.training.row_sampler import RowSampler

_METRIC = "NDCG@10"


def train_text(run: Run) -> None:
    """Users against the whole catalogue, both from frozen vectors through one head; the best epoch's weights are kept.

    It stops early by NDCG@10 on the validation rows with the items of each history left out: what these are worth is
    for the calibrated score to say, and they would stand in the first ranks of all epochs alike.
    """
    config, text = run.config, run.model.text
    assert text is not None  # else this stage is skipped
    text.fetch_vectors()
    stage = config.training.text
    sampler = RowSampler(len(run.rows), stage.rows_per_epoch, config.training.seed + 3)
    num_batches = sampler.num_batches(config.training.rows_of_step(stage))
    trained = _Trained(run.model)
    trainer = StageTrainer(
        run.accelerator,
        trained,
        config.training.optimizer_at(config.training.text_optimizer),
        stage.epochs * num_batches,
        plan=run.plan,
        processes=run.processes,
    )
    stopping = EarlyStopping(stage.patience)
    best = BestWeights(trained)

    def conclude(epoch: int, values: dict[str, Any]) -> None:
        value = run.processes.of_first(_validate(run, text))
        improved = stopping.improved(value, epoch)
        if improved:
            best.keep()
        quality = {f"validation_{_METRIC}_without_history": value}
        run.directory.log(stage="text", epoch=epoch, best=improved, **quality, **values)
        if run.progress:
            print(f"text epoch {epoch + 1}: validation {_METRIC} without the history {value:.4f}", flush=True)

    current = Stage("text", "text", stage, sampler, trainer, stopping, text_loss(run.model))
    current.heads = best
    train_epochs(run, current, conclude)
    best.put_back()
    trained.zero_grad(set_to_none=True)


def initialize_text(model: LaserModel, folder: str) -> None:
    """Begin with the vectors and the trained residual of another model.

    Args:
        folder: what `text.initialize_from` names.

    Raises:
        FileNotFoundError: there is no saved Laser.
        ValueError: it has another catalogue, language model, tokenizer or text settings; names what differs.
    """
    saved = find_saved(resolve_path(folder))
    if saved is None:
        raise FileNotFoundError(f"initialize_text: the folder must hold a saved Laser, got {folder!r}")
    origin = origin_of(model)
    own, others = origin.config.text.model_dump(), saved.description.model.text.model_dump()
    free = {"initialize_from", "item_side", "dropout"}
    differing = [name for name, value in own.items() if name not in free and others[name] != value]
    if saved.description.item_map_hash != item_map_hash(model.item_ids):
        differing.append("catalogue")
    if differing:
        raise ValueError(
            f"initialize_text: {folder!r} must have this model's text settings and catalogue, got other "
            + ", ".join(differing)
        )
    saved.refuse_another_base(model)
    saved.put_text_into(model)


def text_loss(model: LaserModel) -> LossFunction:
    """Cross-entropy of a batch of users against the whole catalogue, as stage 2 has it, of the residual alone."""
    text = model.text
    assert text is not None

    def loss_function(batch: PackedBatch) -> dict[str, Tensor]:
        return {"loss": residual_loss(text, batch, model.temperature, model.mask_history, model.popularity())}

    return loss_function


def residual_loss(
    text: TextResidual,
    batch: PackedBatch,
    temperature: float,
    mask_history: bool,
    popularity: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Mean over the users of a batch with targets and histories for the residual: float32 []; see `Objective`."""
    assert batch.targets is not None and batch.text_items is not None and batch.text_cu_seqlens is not None
    users = text.users(batch.text_items, batch.text_cu_seqlens)
    ignored = history_pairs(batch) if mask_history else None
    return whole_catalog_loss(users, text.items(), batch.targets, temperature, ignored=ignored, popularity=popularity)


class _Trained(nn.Module):
    """What this stage trains: the residual, and the weight of popularity where there is one."""

    def __init__(self, model: LaserModel) -> None:
        super().__init__()
        self.text = model.text
        self.popularity_weight = model.popularity_weight


class BestWeights(nn.Module):
    """The weights of the best epoch so far; kept with the state, so that a resumed run has them too."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self._trained = [trained]  # in a list: its parameters are not this module's
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Take the weights as they are now."""
        for name, tensor in self._trained[0].state_dict().items():
            self.register_buffer(name.replace(".", "_"), tensor.clone())

    @torch.no_grad()
    def put_back(self) -> None:
        """Give back the weights that were kept."""
        for name, tensor in self._trained[0].state_dict().items():
            tensor.copy_(self.get_buffer(name.replace(".", "_")))


def _validate(run: Run, text: TextResidual) -> float:
    """NDCG@10 on the validation rows without the items of each history."""
    with run.processes.apart():
        return text_quality(text, run.config.objective.temperature, run.inputs.split.valid)


def text_quality(text: TextResidual, temperature: float, rows: EvaluationRows) -> float:
    """NDCG@10 of the residual alone, the items of each history ranked last; 0 without rows."""
    if not len(rows):
        return 0.0
    scorer = TextRecommender(text, temperature, without_history=True)
    return evaluate(scorer, rows, device=text.head.weight.device)[_METRIC].mean
