"""Training Laser, from a configuration to the best model in its output folder.

    configuration -> inputs -> model -> stages -> saved run

The stages, in order: `text` the text residual alone, `pretrain` M-Former alone (stage 1), `phase_a` and `phase_b` the
user side against the catalogue (stage 2). The state is kept on the way, see `epochs`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

from laser_fast.config import LaserConfig
from laser_fast.files.claims import claim
from laser_fast.laser.build import Inputs, build_laser, load_inputs, load_language_model
from laser_fast.laser.model import LaserModel
from laser_fast.models.token_budget import Shortage, TokenBudget
from laser_fast.nn.stage1.bert_weights import initialize_qformer, load_bert
from laser_fast.planning.memory import explain_shortage
from laser_fast.planning.plan_table import one_line
from laser_fast.processes import Processes, launched_first, launched_size
from laser_fast.runs.checkpoint import find_run, fingerprint, restore
from laser_fast.runs.resume import StateFolder, refuse_another_beginning
from laser_fast.runs.run_directory import RunDirectory
from laser_fast.runs.tensorboard_log import TensorBoardLog, require_tensorboard
from laser_fast.training.epochs import Session
from laser_fast.training.interruption import Interruption
from laser_fast.training.stage1 import pretrain
from laser_fast.training.stage2 import train_phase
from laser_fast.training.text_stage import initialize_text, train_text
from laser_fast.training.training_rows import laser_rows

_STAGES: dict[str, Callable[[Session], None]] = {
    "text": train_text,
    "pretrain": pretrain,
    "phase_a": partial(train_phase, name="phase_a"),
    "phase_b": partial(train_phase, name="phase_b"),
}


def train_laser(config: LaserConfig, *, resume: bool = False, progress: bool = True) -> tuple[LaserModel, Inputs]:
    """Train by the configuration and leave the best model in `config.output`.

    Started by torchrun or `accelerate launch`, the processes train together as one would; each must call this.

    Args:
        resume: go on with the run in `config.output` from its last whole state; a finished one is only loaded.
        progress: show bars and a line for every epoch.

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
        model = _build(config, inputs, accelerator.device)
        directory = _open(config, processes, resume=resume)
        states = StateFolder(directory)
        if directory.finished:
            states.clear()  # a kill may have come before
            if progress:
                print(f"{config.output} is finished: nothing is left to train", flush=True)
        else:
            session = Session(
                config=config,
                inputs=inputs,
                model=model,
                rows=laser_rows(config, inputs, warn=processes.first),
                directory=directory,
                accelerator=accelerator,
                processes=processes,
                interruption=Interruption(processes),
                states=states,
                fingerprint=fingerprint(inputs),
                progress=progress,
                plan=partial(one_line, config, on_gpu=accelerator.device.type == "cuda"),
            )
            _train(session, resume)
    return restore(model.eval(), inputs, find_run(directory.checkpoint)), inputs


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
    several = launched_size() > 1
    if several and config.training.halve_on_oom:
        raise ValueError(
            "train_laser: training.halve_on_oom must be false in several processes (one that took a step again would "
            "leave the others waiting), got true"
        )
    return Accelerator(
        cpu=several and not torch.cuda.is_available(),  # without a word accelerate joins only processes with GPUs
        mixed_precision=config.training.mixed_precision,
        # a batch is of all processes, so the schedule goes on by one with every step
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


def _build(config: LaserConfig, inputs: Inputs, device: torch.device) -> LaserModel:
    model = build_laser(config, inputs, *load_language_model(config.lm)).to(device)
    if model.mformer is not None and config.mformer.initialize_from is not None:
        initialize_qformer(model.mformer.qformer, load_bert(config.mformer.initialize_from, model.mformer.qformer))
    if model.text is not None and config.text.initialize_from is not None:
        initialize_text(model, config.text.initialize_from)
    return model


def _open(config: LaserConfig, processes: Processes, *, resume: bool) -> RunDirectory:
    """The run directory, which the first process makes or opens; for the others it is a view."""
    directory: RunDirectory | None = None
    with _together(processes):
        if processes.first:
            directory = RunDirectory(config.output, config, resume=resume)
    if directory is None:
        return RunDirectory(config.output, config, writes=False)
    if config.training.tensorboard and not directory.finished:
        directory.curves = TensorBoardLog(directory.path / "tensorboard")
    return directory


def _train(session: Session, resume: bool) -> None:
    """Everything between the first step and the last."""
    processes = session.processes
    if processes.rank:  # dropout of its share is independent of that of the others
        seeds = np.random.SeedSequence([session.config.training.seed, processes.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
    session.model.budget = _token_budget(session)
    if resume:
        _resume(session)
    names = list(_STAGES)
    if session.resumed is not None:
        names = names[names.index(session.resumed.values["position"]["stage"]) :]
    with session.interruption:
        for name in names:
            _STAGES[name](session)
    session.directory.finish()
    session.states.clear()
    processes.wait()


def _resume(session: Session) -> None:
    """Find the state to go on from and put back the files that belong to it."""
    first, processes = session.processes.first, session.processes
    with warnings.catch_warnings():
        if not first:  # all read the same states, one says it
            warnings.simplefilter("ignore")
        state = session.states.newest()
    if state is None and first:
        warnings.warn(f"train_laser: {session.config.output} has no state yet; it begins anew", stacklevel=4)
    if state is not None:
        position = state.values["position"]
        refuse_another_beginning("train_laser", position["fingerprint"], session.fingerprint)
        if session.progress:
            print(f"goes on after step {position['step']} of {position['stage']}", flush=True)
    processes.wait()
    session.states.put_back_files()
    processes.wait()
    session.resumed = state


def _token_budget(session: Session) -> TokenBudget:
    """One budget for training and for encoding; what lowers it stands in the log."""
    training = session.config.training

    def log(shortage: Shortage) -> None:
        values = {"failed_tokens": shortage.tokens, "failed_rows": shortage.rows, "encoding": shortage.encoding}
        session.directory.log(stage="out_of_memory", **values, micro_batch_tokens=budget.limit)

    on_gpu = session.accelerator.device.type == "cuda"
    explain = explain_shortage(session.config, on_gpu=on_gpu, plan=session.plan)
    budget = TokenBudget(training.micro_batch_tokens, halve=training.halve_on_oom, explain=explain, on_halving=log)
    return budget
