"""Stage 1: M-Former alone learns to say in its queries what the text of the same history says."""

from typing import Any

import torch
from torch import Tensor, nn

from laser_fast.data.batches import PackedBatch
from laser_fast.models.token_budget import TokenBudget
from laser_fast.nn.pretraining import ContrastiveHeads
from laser_fast.training.epochs import Run, Stage, train_epochs
from laser_fast.training.loop import EarlyStopping, RowSampler, StageTrainer
from laser_fast.training.memory import explain_pretraining_shortage


def pretrain(run: Run) -> None:
    """Stage 1: contrastive loss between M-Former's queries and the text of the same history, plus the balance loss."""
    config, model = run.config, run.model
    mformer, recommender = model.mformer, model.recommender
    assert mformer is not None and recommender is not None  # the configuration demands them
    heads = ContrastiveHeads(
        mformer.qformer,
        config.mformer.width,
        model.lm.hidden_size,
        max_tokens=_longest_text(run),
        temperature=config.objective.contrastive_temperature,
        label_smoothing=config.objective.label_smoothing,
    ).to(run.accelerator.device)

    def loss_function(batch: PackedBatch) -> dict[str, Tensor]:
        written = mformer(recommender.states(batch.items, batch.cu_seqlens), batch.cu_seqlens)
        contrastive = heads(written.queries, model.lm.embed(batch.input_ids).float(), batch.token_cu_seqlens)
        balance = written.routing.balance_loss
        loss = contrastive + config.objective.balance_weight * balance
        return {"loss": loss, "contrastive": contrastive, "balance": balance, "load": written.routing.load}

    stage = config.training.pretrain
    sampler = RowSampler(len(run.rows), stage.rows_per_epoch, config.training.seed)
    num_batches = sampler.num_batches(config.training.batch_size)
    modules = nn.ModuleList([mformer, heads])
    trainer = StageTrainer(
        run.accelerator,
        modules,
        config.training.pretrain_optimizer,
        stage.epochs * num_batches,
        budget=TokenBudget(explain=explain_pretraining_shortage(config, run.plan)),  # rows are each other's negatives
        plan=run.plan,
    )
    stopping = EarlyStopping(stage.patience)

    def conclude(epoch: int, values: dict[str, Any]) -> None:
        validation = _validation_loss(run, modules, loss_function)
        run.directory.log(stage="pretrain", epoch=epoch, validation_contrastive=validation, **values)
        stopping.improved(-validation, epoch)

    current = Stage("pretrain", "stage 1", stage, sampler, trainer, stopping, loss_function, heads=heads)
    train_epochs(run, current, conclude)


@torch.no_grad()
def _validation_loss(run: Run, modules: nn.Module, loss_function: Any) -> float:
    modules.eval()
    valid, size = run.inputs.split.valid, run.config.training.batch_size
    losses = []
    for start in range(0, len(valid), size):
        chunk = valid.select(range(start, min(start + size, len(valid))))
        batch = run.model.builder.histories(chunk.histories).to(run.accelerator.device)
        losses.append(float(loss_function(batch)["contrastive"]) * len(chunk))
    return sum(losses) / max(1, len(valid))


def _longest_text(run: Run) -> int:
    layout = run.model.builder.user_layout
    return len(layout.left) + layout.max_tokens + len(layout.right)
