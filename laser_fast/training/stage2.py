"""Stage 2: users against the item matrix V, in two phases; the model with the best validation metric is kept.

phase A   V is encoded anew after each epoch; the untrained model is the first candidate
phase B   V stays as it was at the best epoch of phase A; the user side alone goes on from there

Several processes each encode and rank a share of the rows; all get the results.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from laser_fast.data.batches import PackedBatch
from laser_fast.data.negatives import NegativeSampler
from laser_fast.evaluation import evaluate, search_calibration
from laser_fast.laser.build import training_counts
from laser_fast.recommenders.protocol import Scorer
from laser_fast.retrieval.calibration import CalibratedScorer, calibration_components
from laser_fast.runs.checkpoint import find_run, save_laser
from laser_fast.training.epochs import Session, Stage
from laser_fast.training.loop import EarlyStopping

_METRIC = "NDCG@10"


def train_phase(session: Session, name: str) -> None:
    """Train by "phase_a" or "phase_b"; the latter must beat the best model of the former to be kept."""
    config, model, objective = session.config, session.model, session.config.objective
    frozen_items = name == "phase_b"
    settings = config.training.phase_b if frozen_items else config.training.phase_a
    with_positives = not frozen_items and objective.item_gradient == "positives"
    step = replace(session.step, items_train=with_positives)
    if model.item_side == "text" and objective.candidates == "catalog":
        with_positives = False  # all items are made anew in every step
    seed, negatives = config.training.seed + 1 + frozen_items, None
    if objective.num_negatives and (with_positives or objective.candidates == "sampled"):  # V holds them anyway
        negatives = NegativeSampler(session.rows.train, model.num_items, objective.num_negatives, seed)
    if frozen_items and not session.stands_in(name):
        session.processes.wait()
        find_run(session.directory.checkpoint).put_into(model)
    stopping = EarlyStopping(settings.patience, session.best)

    def loss(batch: PackedBatch) -> dict[str, Tensor]:
        output = model(batch, step=step)
        values = {"loss": output.loss, "cross_entropy": output.cross_entropy, "balance": output.balance_loss}
        return values if output.load is None else values | {"load": output.load}

    def conclude(epoch: int, values: dict[str, Any]) -> None:
        if frozen_items:
            model.keep_items()
        else:
            _refresh_items(session)
        value = session.processes.of_first(_validate(session))  # on which all decide alike
        improved = stopping.improved(value, epoch)
        session.directory.log(stage=name, epoch=epoch, best=improved, **{f"validation_{_METRIC}": value}, **values)
        if session.progress:
            shown = "".join(f", {key} {values[key]:.3f}" for key in ("cross_entropy", "balance") if key in values)
            mark = " (best)" if improved else ""
            print(f"{name} epoch {epoch + 1}: validation {_METRIC} {value:.4f}{mark}{shown}", flush=True)
        if improved and session.processes.first:
            folder = session.directory.checkpoint
            save_laser(model, config, folder, stage=name, epoch=epoch, validation={_METRIC: value})

    Stage(
        session=session,
        name=name,
        title=f"stage 2 {name.replace('_', ' ')}",
        settings=settings,
        optimizer=config.training.optimizer,
        seed=seed,
        modules=model,
        loss_function=loss,
        stopping=stopping,
        conclude=conclude,
        budget=model.budget,
        virtual_tokens=model.virtual_tokens,
        with_positives=with_positives,
        negatives=negatives,
        judges_first=not frozen_items,
    ).train()
    session.best = stopping.best


def _validate(session: Session) -> float:
    """The metric over the whole catalogue for all validation users, of the score that will be served."""
    model, config, valid = session.model.eval(), session.config.evaluation, session.inputs.split.valid
    scorer, device = _SharedScorer(model, session), session.accelerator.device
    if not config.calibrate:
        return evaluate(scorer, valid, batch_size=config.batch_size, device=device)[_METRIC].mean
    recommender = session.inputs.recommender if config.recommender_score else None
    tables = session.inputs.tables(config)
    components = calibration_components(model, recommender, tables)
    counts = torch.from_numpy(training_counts(session.inputs.split, model.num_items))
    fitted, value = search_calibration(
        components | {"laser": scorer},
        valid,
        counts,
        standardize=("recommender",) if recommender is not None else (),
        batch_size=config.batch_size,
        device=device,
    )
    model.calibration = CalibratedScorer(components, fitted.calibration, counts).without_unused(tables)
    return value


def _refresh_items(session: Session) -> None:
    """Encode the catalogue with the current parameters: V of all processes, a share of it in each."""
    model, processes, size = session.model, session.processes, 2 * session.config.evaluation.batch_size
    if processes.size == 1:
        model.refresh_items(batch_size=size, progress=session.progress)
        return
    own, rows = processes.share(model.num_items), []
    starts = range(0, len(processes.share(model.num_items, 0)), size)  # the first share is the largest
    for start in tqdm(starts, desc="encode items", unit="batch", disable=not session.progress, leave=False):
        session.interruption.poll()
        rows.append(model.encode_items(own[start : start + size].tolist(), batch_size=size))
    model.item_matrix = torch.cat(processes.gather_parts(torch.cat(rows)))


class _SharedScorer:
    """A `Scorer` of which every process scores a share of the histories; all get all scores."""

    def __init__(self, scorer: Scorer, session: Session) -> None:
        self.scorer = scorer
        self.session = session

    @property
    def num_items(self) -> int:
        return self.scorer.num_items

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`; all processes call it with the same histories."""
        self.session.interruption.poll()
        rows = self.session.processes.share(len(cu_seqlens) - 1)
        first, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 1)  # none: one, not given to anybody
        bounds = cu_seqlens[first : end + 1]
        own = self.scorer.score(items[int(bounds[0]) : int(bounds[-1])], bounds - bounds[0])
        return torch.cat(self.session.processes.gather_parts(own[: len(rows)]))
