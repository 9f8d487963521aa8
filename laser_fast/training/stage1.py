"""Stage 1: M-Former alone learns to say in its queries what the text of the same history says."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laser_fast.config import LaserConfig
from laser_fast.data.batches import BatchBuilder, PackedBatch
from laser_fast.laser.model import LaserModel
from laser_fast.models.token_budget import TokenBudget
from laser_fast.nn.mformer import balance_across
from laser_fast.nn.stage1.bert_weights import initialize_text_branch, load_bert
from laser_fast.nn.stage1.heads import Pairs, PretrainingHeads, TermWeights, Vocabulary
from laser_fast.planning.memory import explain_pretraining_shortage
from laser_fast.training.epochs import Run, Stage, train_epochs
from laser_fast.training.loop import EarlyStopping, LossFunction, StageTrainer
from laser_fast.training.row_sampler import RowSampler


def pretrain(run: Run) -> None:
    """Stage 1: the weighted terms between M-Former's queries and the text of the same history, plus the balance loss.

    It stops early by the weighted sum of the terms on the validation rows.
    """
    config, model = run.config, run.model
    assert model.mformer is not None
    heads = build_heads(config, model).to(run.accelerator.device)
    run.processes.synchronize(heads)  # each drew its own
    loss_function = pretraining_loss(model, heads)
    stage = config.training.pretrain
    sampler = RowSampler(len(run.rows), stage.rows_per_epoch, config.training.seed)
    num_batches = sampler.num_batches(config.training.rows_of_step(stage))
    modules = nn.ModuleList([model.mformer, heads])
    trainer = StageTrainer(
        run.accelerator,
        modules,
        config.training.optimizer_at(config.training.pretrain_optimizer),
        stage.epochs * num_batches,
        budget=TokenBudget(explain=explain_pretraining_shortage(config, run.plan)),  # rows are each other's negatives
        plan=run.plan,
        processes=run.processes,
    )
    stopping = EarlyStopping(stage.patience)

    def conclude(epoch: int, values: dict[str, Any]) -> None:
        with run.processes.apart():
            found = _validate(run, modules, loss_function)
        value = run.processes.of_first(found["validation_terms"])  # on which all decide alike
        run.directory.log(stage="pretrain", epoch=epoch, **found, **values)
        stopping.improved(-value, epoch)

    current = Stage("pretrain", "stage 1", stage, sampler, trainer, stopping, loss_function, heads=heads)
    train_epochs(run, current, conclude)


def build_heads(config: LaserConfig, model: LaserModel) -> PretrainingHeads:
    """What stage 1 trains beside M-Former; begins with the layers of a BERT where the configuration names one.

    Raises:
        FileNotFoundError, ValueError: of that BERT; see `bert_weights`.
    """
    objective, builder = config.objective, model.builder
    assert model.mformer is not None
    weights = TermWeights(objective.contrastive_weight, objective.matching_weight, objective.generation_weight)
    layout = builder.user_layout
    heads = PretrainingHeads(
        model.mformer,
        model.lm.hidden_size,
        max_tokens=len(layout.left) + layout.max_tokens + len(layout.right),
        weights=weights,
        vocabulary=text_vocabulary(builder, model) if weights.generation else None,
    )
    if config.mformer.initialize_from is not None:
        bert = load_bert(config.mformer.initialize_from, model.mformer.qformer)
        initialize_text_branch(heads.text, bert)
    return heads


def text_vocabulary(builder: BatchBuilder, model: LaserModel) -> Vocabulary:
    """All tokens that can stand in a text of a history, and their frozen embeddings.

    No other token is ever to be foretold, and a catalogue's titles use few of the 32,000 to 260,000 of a large model.
    """
    layout = builder.user_layout
    words = np.concatenate([builder.texts.input_ids, layout.left, layout.right, layout.separator]).astype(np.int64)
    input_ids = torch.from_numpy(np.unique(words)).to(model.device)
    return Vocabulary(input_ids, model.lm.embed(input_ids))


def pretraining_loss(model: LaserModel, heads: PretrainingHeads) -> LossFunction:
    """The loss of a batch of histories, each term that is on, the balance loss and the load."""
    mformer, recommender = model.mformer, model.recommender
    assert mformer is not None and recommender is not None  # the configuration demands them
    keep = heads.weights.generation > 0

    def loss_function(batch: PackedBatch) -> dict[str, Tensor]:
        states = recommender.states(batch.items, batch.cu_seqlens, batch.folds)
        written = mformer(states, batch.cu_seqlens, keep_layer_inputs=keep)
        embeds = model.lm.embed(batch.input_ids).float()
        pairs = Pairs(batch.items, batch.cu_seqlens, batch.input_ids, embeds, batch.token_cu_seqlens)
        values = heads(written, pairs, model.processes.gather)
        balance, load = balance_across(written.routing, batch.cu_seqlens, model.balance_processes)
        terms = values.pop("loss")
        loss = terms + model.balance_weight * balance
        return {"loss": loss, "terms": terms, **values, "balance": balance, "load": load}

    return loss_function


@torch.no_grad()
def _validate(run: Run, modules: nn.Module, loss_function: LossFunction) -> dict[str, float]:
    """Means over the validation rows of the terms and of their weighted sum; every process goes through all rows."""
    modules.eval()
    valid, size = run.inputs.split.valid, run.config.training.batch_size
    totals: dict[str, float] = {}
    for start in range(0, len(valid), size):
        chunk = valid.select(range(start, min(start + size, len(valid))))
        batch = run.model.builder.histories(chunk.histories).to(run.accelerator.device)
        for name, value in loss_function(batch).items():
            if name not in ("loss", "balance", "load"):
                name = f"validation_{name}"
                totals[name] = totals.get(name, 0.0) + float(value) * len(chunk) / len(valid)
    return totals or {"validation_terms": 0.0}
