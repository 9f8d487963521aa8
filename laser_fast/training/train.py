"""Training Laser: stage 1 (M-Former alone), then stage 2 in two phases, the best checkpoint kept.

text      where there is a text residual: it alone, before stage 1
phase A   the item matrix V is encoded anew at the start of each epoch; users are trained against all of it
phase B   V stays as it was at the best epoch of phase A; only the user side goes on

The state is kept on the way, see `epochs`.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor

from laser_fast.config import LaserConfig
from laser_fast.data.batches import PackedBatch
from laser_fast.data.negatives import NegativeSampler
from laser_fast.evaluation import evaluate, search_calibration
from laser_fast.files.claims import claim
from laser_fast.laser.build import Inputs, build_laser, load_inputs, load_language_model, training_counts
from laser_fast.laser.model import LaserModel
from laser_fast.models.objective import StepContext
from laser_fast.models.token_budget import Shortage, TokenBudget
from laser_fast.nn.stage1.bert_weights import initialize_qformer, load_bert
from laser_fast.planning.memory import Plan, explain_shortage
from laser_fast.planning.plan_table import one_line
from laser_fast.processes import Processes, launched_first, launched_size
from laser_fast.retrieval.calibration import CalibratedScorer, calibration_components
from laser_fast.runs.checkpoint import fingerprint, load_weights, restore, save_laser
from laser_fast.runs.resume import StateFolder, refuse_another_beginning
from laser_fast.runs.run_directory import RunDirectory
from laser_fast.runs.tensorboard_log import TensorBoardLog, require_tensorboard
from laser_fast.training.epochs import Run, Stage, keep_state, train_epochs
from laser_fast.training.interruption import Interruption
from laser_fast.training.loop import EarlyStopping, EpochSums, StageTrainer
from laser_fast.training.row_folds import laser_rows
from laser_fast.training.row_sampler import RowSampler
from laser_fast.training.shares import SharedScorer, refresh_items, separate_random_streams
from laser_fast.training.stage1 import pretrain
from laser_fast.training.text_stage import initialize_text, train_text

MAIN_METRIC = "NDCG@10"


def train_laser(
    config: LaserConfig, *, resume: bool = False, progress: bool = True, plan: Plan | None = None
) -> tuple[LaserModel, Inputs]:
    """Train by the configuration and leave the best model in `config.output`.

    Started by torchrun or `accelerate launch`, the processes train together as one would; each must call this.

    Args:
        resume: go on with the run in `config.output` from its last whole state; a finished one is only loaded.
        progress: show bars and a line for every epoch.
        plan: says what the memory plan expected; asked when memory runs out. None = `plan_table.one_line`.

    Returns:
        The best model, in evaluation mode with its item matrix, and the data it was built on; in every process.

    Raises:
        FileExistsError: `config.output` holds something, or what is to be resumed lies behind a link.
        FileNotFoundError, ValueError: the data, the recommender or the language model are missing or do not fit; the
            run to resume is missing, damaged, or of another configuration; another process writes `config.output`.
        FloatingPointError: the loss is not finite.
        OtherProcessFailed: another process of this training stopped.
        Interrupted: SIGTERM or SIGINT came; the step was finished and the state is kept.
        torch.OutOfMemoryError: memory ran out; names the settings to change.
        ImportError: `training.tensorboard` without the package.
    """
    if config.training.tensorboard:
        require_tensorboard()
    accelerator = _accelerator(config)
    processes = Processes(accelerator.device)
    progress = progress and processes.first
    with ExitStack() as lock:
        _claim(config, processes, lock, resume=resume)
        set_seed(config.training.seed)
        inputs = load_inputs(config)
        language_model, tokenizer = load_language_model(config.lm)
        model = build_laser(config, inputs, language_model, tokenizer).to(accelerator.device)
        if model.mformer is not None and config.mformer.initialize_from is not None:
            initialize_qformer(model.mformer.qformer, load_bert(config.mformer.initialize_from, model.mformer.qformer))
        if model.text is not None and config.text.initialize_from is not None:
            initialize_text(model, config.text.initialize_from)
        directory = _open(config, processes, resume=resume)
        if directory.finished:
            StateFolder(directory).clear()  # a kill may have come before
            if progress:
                print(f"{config.output} is finished: nothing is left to train", flush=True)
            return restore(model.eval(), inputs, directory.checkpoint), inputs
        if config.training.tensorboard and processes.first:
            directory.curves = TensorBoardLog(directory.path / "tensorboard")
        rows = laser_rows(config, inputs, warn=processes.first)
        plan = plan or partial(one_line, config, on_gpu=accelerator.device.type == "cuda")
        files = StateFolder(directory), Interruption(processes), fingerprint(inputs), processes
        run = Run(config, inputs, model, rows, directory, accelerator, progress, plan, *files)
        _train(run, resume)
    return restore(model.eval(), inputs, directory.checkpoint), inputs


def is_finished(config: LaserConfig) -> bool:
    """Whether the run in `config.output` came to its end, without loading anything; what a kill after it left goes.

    Raises:
        FileNotFoundError, ValueError: there is no such run, it began with other settings, or another process is at it.
    """
    directory = RunDirectory(config.output, config, resume=True, writes=launched_first())
    if directory.finished and directory.writes:
        with claim(Path(config.output).resolve()):
            StateFolder(directory).clear()
    return directory.finished


def _accelerator(config: LaserConfig) -> Accelerator:
    """Of this process; a batch is of all processes, so the schedule goes on by one with every step.

    Raises:
        ValueError: settings that several processes cannot follow.
    """
    several = launched_size() > 1
    if several and config.training.halve_on_oom:
        raise ValueError(
            "train_laser: training.halve_on_oom must be false in several processes (one that took a step again would "
            "leave the others waiting), got true"
        )
    return Accelerator(
        cpu=several and not torch.cuda.is_available(),  # without a word accelerate joins only processes with GPUs
        mixed_precision=config.training.mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


@contextmanager
def _together(processes: Processes) -> Iterator[None]:
    """What one process refuses in here, all do."""
    error: Exception | None = None
    try:
        yield
    except (OSError, ValueError) as refused:
        error = refused
    processes.raise_together(error)


def _claim(config: LaserConfig, processes: Processes, lock: ExitStack, *, resume: bool) -> None:
    """Claim the output and look at it, before minutes of loading; the first process does."""
    with _together(processes):
        if not processes.first:
            return
        lock.enter_context(claim(Path(config.output).resolve()))
        if resume:
            RunDirectory(config.output, config, resume=True, writes=False)
        else:
            RunDirectory.refuse_used(config.output)


def _open(config: LaserConfig, processes: Processes, *, resume: bool) -> RunDirectory:
    """The run directory, which the first process makes or opens; for the others it is a view."""
    with _together(processes):
        if processes.first:
            return RunDirectory(config.output, config, resume=resume)
    return RunDirectory(config.output, config, writes=False)


def _train(run: Run, resume: bool) -> None:
    """Everything between the first step and the last."""
    separate_random_streams(run)
    run.model.encode_within(_token_budget(run))
    if resume:
        _resume(run)
    with run.interruption:
        _train_stages(run)
    run.directory.finish()
    run.states.clear()
    run.processes.wait()


def _resume(run: Run) -> None:
    """Find the state to go on from and put back the files that belong to it."""
    with warnings.catch_warnings():
        if not run.processes.first:  # all read the same states, one says it
            warnings.simplefilter("ignore")
        state = run.states.newest()
    if state is None and run.processes.first:
        warnings.warn(f"train_laser: {run.config.output} has no state yet; it begins anew", stacklevel=4)
    if state is not None:
        refuse_another_beginning("train_laser", state.values["position"]["fingerprint"], run.fingerprint)
        if run.progress:
            position = state.values["position"]
            print(f"goes on after step {position['step']} of {position['stage']}", flush=True)
    run.processes.wait()
    run.states.put_back_files()
    run.processes.wait()
    run.resumed = state


def _train_stages(run: Run) -> None:
    """All stages, or those from the one on in which the run stands."""
    in_phase_b = run.stands_in("phase_b")
    past_stage_1 = in_phase_b or run.stands_in("phase_a")
    trains_text = run.model.text is not None and run.config.training.text.epochs
    if trains_text and not (past_stage_1 or run.stands_in("pretrain")):
        train_text(run)
    if run.config.training.pretrain.epochs and not past_stage_1:
        pretrain(run)
    best = -1.0 if in_phase_b else _phase(run, "phase_a", -1.0)
    _phase(run, "phase_b", best)


def _phase(run: Run, name: str, best: float) -> float:
    """One phase of stage 2, which must beat `best` to be kept; phase B starts from the best of phase A."""
    config, model = run.config, run.model
    frozen_items = name == "phase_b"
    stage = config.training.phase_b if frozen_items else config.training.phase_a
    stopping = EarlyStopping(stage.patience, best)
    with_positives = not frozen_items and config.objective.item_gradient == "positives"
    step = replace(run.step, items_train=with_positives)
    if model.item_side == "text" and config.objective.candidates == "catalog":
        with_positives = False  # all items are made anew in every step
    sampler = RowSampler(len(run.rows), stage.rows_per_epoch, config.training.seed + 1 + frozen_items)
    num_batches = sampler.num_batches(config.training.rows_of_step(stage))
    trainer = StageTrainer(
        run.accelerator,
        model,
        config.training.optimizer,
        stage.epochs * num_batches,
        budget=model.budget,
        virtual_tokens=model.virtual_tokens,
        plan=run.plan,
        processes=run.processes,
    )
    title, loss_function = f"stage 2 {name.replace('_', ' ')}", _training_loss(model, step)
    current = Stage(name, title, stage, sampler, trainer, stopping, loss_function, with_positives=with_positives)
    objective = config.objective
    if objective.num_negatives and (with_positives or objective.candidates == "sampled"):  # V holds them anyway
        current.negatives = NegativeSampler(run.rows.train, model.num_items, objective.num_negatives, sampler.seed)
    if not run.stands_in(name):
        _begin_phase(run, current)

    def conclude(epoch: int, values: dict[str, Any]) -> None:
        if frozen_items:
            model.keep_items()
        else:
            refresh_items(run)
        _validate(run, stopping, name, epoch, **values)

    train_epochs(run, current, conclude)
    return stopping.best


def _begin_phase(run: Run, stage: Stage) -> None:
    """Phase A ranks the untrained model, the first candidate; phase B starts from the best one so far."""
    if stage.name == "phase_b":
        run.processes.wait()
        load_weights(run.model, run.directory.checkpoint)
        return
    with run.interruption.at_once():
        refresh_items(run)
        _validate(run, stage.stopping, stage.name, -1)
    keep_state(run, stage, 0, EpochSums())


def _calibrate(run: Run) -> tuple[CalibratedScorer, float]:
    """Fit the scalars of the calibrated score on the validation rows; with the metric they reach there."""
    inputs = run.inputs
    wanted = run.config.evaluation
    recommender = inputs.recommender if wanted.recommender_score else None
    tables = inputs.tables(wanted)
    components = calibration_components(run.model, recommender, tables)
    counts = torch.from_numpy(training_counts(inputs.split, run.model.num_items))
    fitted, value = search_calibration(
        components | {"laser": SharedScorer(run.model, run)},
        inputs.split.valid,
        counts,
        standardize=("recommender",) if recommender is not None else (),
        batch_size=run.config.evaluation.batch_size,
        device=run.accelerator.device,
    )
    return CalibratedScorer(components, fitted.calibration, counts).without_unused(tables), value


def _token_budget(run: Run) -> TokenBudget:
    """One budget for training and for encoding; what lowers it stands in the log."""
    training = run.config.training

    def log(shortage: Shortage) -> None:
        values = {"failed_tokens": shortage.tokens, "failed_rows": shortage.rows, "encoding": shortage.encoding}
        run.directory.log(stage="out_of_memory", **values, micro_batch_tokens=budget.limit)

    explain = explain_shortage(run.config, on_gpu=run.accelerator.device.type == "cuda", plan=run.plan)
    budget = TokenBudget(training.micro_batch_tokens, halve=training.halve_on_oom, explain=explain, on_halving=log)
    return budget


def _training_loss(model: LaserModel, step: StepContext) -> Any:
    def loss_function(batch: PackedBatch) -> dict[str, Tensor]:
        output = model(batch, step=step)
        values = {"loss": output.loss, "cross_entropy": output.cross_entropy, "balance": output.balance_loss}
        return values if output.load is None else values | {"load": output.load}

    return loss_function


def _validate(run: Run, stopping: EarlyStopping, phase: str, epoch: int, **values: Any) -> None:
    """Rank the whole catalogue for all validation users; keep the model when it is the best so far."""
    model, size = run.model.eval(), run.config.evaluation.batch_size
    if run.config.evaluation.calibrate:  # what will be served decides which epoch is the best
        model.calibration, value = _calibrate(run)
    else:
        metrics = evaluate(
            SharedScorer(model, run), run.inputs.split.valid, batch_size=size, device=run.accelerator.device
        )
        value = metrics[MAIN_METRIC].mean
    value = run.processes.of_first(value)  # on which all decide alike
    improved = stopping.improved(value, epoch)
    run.directory.log(stage=phase, epoch=epoch, best=improved, **{f"validation_{MAIN_METRIC}": value}, **values)
    if run.progress:
        shown = "".join(f", {key} {values[key]:.3f}" for key in ("cross_entropy", "balance") if key in values)
        mark = " (best)" if improved else ""
        print(f"{phase} epoch {epoch + 1}: validation {MAIN_METRIC} {value:.4f}{mark}{shown}", flush=True)
    if improved and run.processes.first:
        save_laser(
            run.model,
            run.config,
            run.directory.checkpoint,
            stage=phase,
            epoch=epoch,
            validation={MAIN_METRIC: value},
        )
