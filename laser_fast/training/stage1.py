"""Stage 1: M-Former alone learns to put into its queries what the text of the same history says."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laser_fast.config import LaserConfig
from laser_fast.data.batches import PackedBatch
from laser_fast.laser.model import LaserModel
from laser_fast.models.objective import StepContext
from laser_fast.models.token_budget import TokenBudget
from laser_fast.nn.mformer import balance_across
from laser_fast.nn.stage1.bert_weights import initialize_text_branch, load_bert
from laser_fast.nn.stage1.heads import Pairs, PretrainingHeads, TermWeights, Vocabulary
from laser_fast.planning.shortages import explain_pretraining_shortage
from laser_fast.training.epochs import Session, Stage
from laser_fast.training.loop import EarlyStopping, LossFunction


def pretrain(session: Session) -> None:
    """Train M-Former; the weighted sum of the loss terms on the validation rows stops the stage early."""
    config, model, processes = session.config, session.model, session.processes
    if not config.training.pretrain.epochs:
        return
    assert model.mformer is not None  # the configuration demands it
    heads = build_heads(config, model).to(session.accelerator.device)
    processes.synchronize(heads)  # each drew its own
    modules, loss = nn.ModuleList([model.mformer, heads]), pretraining_loss(model, heads, session.step)
    stopping = EarlyStopping(config.training.pretrain.patience)
    budget = TokenBudget(explain=explain_pretraining_shortage(config, session.plan))  # rows are each other's negatives

    def conclude(epoch: int, values: dict[str, Any]) -> None:
        with processes.apart():
            found = _validate(session, modules, loss)
        value = processes.of_first(found["validation_terms"])  # on which all decide alike
        session.run.log(stage="pretrain", epoch=epoch, **found, **values)
        stopping.improved(-value, epoch)

    Stage(
        session=session,
        name="pretrain",
        title="stage 1",
        settings=config.training.pretrain,
        optimizer=config.training.optimizer_at(config.training.pretrain_optimizer),
        seed=config.training.seed,
        modules=modules,
        loss_function=loss,
        stopping=stopping,
        conclude=conclude,
        heads=heads,
        budget=budget,
    ).train()


def build_heads(config: LaserConfig, model: LaserModel) -> PretrainingHeads:
    """What stage 1 trains beside M-Former; begins with the layers of a BERT where the configuration names one."""
    objective = config.objective
    assert model.mformer is not None
    weights = TermWeights(objective.contrastive_weight, objective.matching_weight, objective.generation_weight)
    layout = model.builder.user_layout
    heads = PretrainingHeads(
        model.mformer,
        model.lm.hidden_size,
        max_tokens=len(layout.left) + layout.max_tokens + len(layout.right),
        weights=weights,
        vocabulary=text_vocabulary(model) if weights.generation else None,
    )
    if config.mformer.initialize_from is not None:
        initialize_text_branch(heads.text, load_bert(config.mformer.initialize_from, model.mformer.qformer))
    return heads


def text_vocabulary(model: LaserModel) -> Vocabulary:
    """All tokens that can occur in the text of a history, and their frozen embeddings.

    A catalogue's titles use few of the 32,000 to 260,000 tokens of a large model, and no other is ever a target.
    """
    layout = model.builder.user_layout
    words = np.concatenate([model.builder.texts.input_ids, layout.left, layout.right, layout.separator]).astype(
        np.int64
    )
    input_ids = torch.from_numpy(np.unique(words)).to(model.device)
    return Vocabulary(input_ids, model.lm.embed(input_ids))


def pretraining_loss(model: LaserModel, heads: PretrainingHeads, step: StepContext | None = None) -> LossFunction:
    """The loss of a batch of histories, with its terms, the balance loss and the load."""
    mformer, recommender = model.mformer, model.recommender
    assert mformer is not None and recommender is not None  # the configuration demands them
    keep, step = heads.weights.generation > 0, step or StepContext()

    def loss_function(batch: PackedBatch) -> dict[str, Tensor]:
        states = recommender.states(batch.items, batch.cu_seqlens, batch.folds)
        written = mformer(states, batch.cu_seqlens, keep_layer_inputs=keep)
        embeds = model.lm.embed(batch.input_ids).float()
        pairs = Pairs(batch.items, batch.cu_seqlens, batch.input_ids, embeds, batch.token_cu_seqlens)
        values = heads(written, pairs, step.processes.gather)
        balance, load = balance_across(written.routing, batch.cu_seqlens, step.balance_processes)
        terms = values.pop("loss")
        loss = terms + model.objective.balance_weight * balance
        return {"loss": loss, "terms": terms, **values, "balance": balance, "load": load}

    return loss_function


@torch.no_grad()
def _validate(session: Session, modules: nn.Module, loss_function: LossFunction) -> dict[str, float]:
    """Means of the terms and their weighted sum over all validation rows."""
    modules.eval()
    valid, size = session.inputs.split.valid, session.config.training.batch_size
    totals: dict[str, float] = {}
    for start in range(0, len(valid), size):
        chunk = valid.select(range(start, min(start + size, len(valid))))
        batch = session.model.builder.histories(chunk.histories).to(session.accelerator.device)
        for name, value in loss_function(batch).items():
            if name not in ("loss", "balance", "load"):
                name = f"validation_{name}"
                totals[name] = totals.get(name, 0.0) + float(value) * len(chunk) / len(valid)
    return totals or {"validation_terms": 0.0}
