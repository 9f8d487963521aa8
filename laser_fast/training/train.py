"""Training Laser, from a configuration to the best model in its output folder.

    configuration -> inputs -> model -> stages -> saved run

The stages, in order: `text` trains the text residual alone, `pretrain` M-Former alone (stage 1), `phase_a` and
`phase_b` the user side against the catalogue (stage 2). States are kept on the way, see `epochs`.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

from laser_fast.config import LaserConfig
from laser_fast.laser.build import Inputs, build_laser, load_inputs, load_language_model
from laser_fast.laser.laser_files import weights_hash
from laser_fast.laser.model import LaserModel
from laser_fast.models.token_budget import Shortage, TokenBudget
from laser_fast.nn.stage1.bert_weights import initialize_qformer, load_bert
from laser_fast.planning.plan_table import one_line
from laser_fast.planning.shortages import explain_shortage
from laser_fast.processes import Processes, launched_first, launched_size
from laser_fast.runs.checkpoint import find_run, restore
from laser_fast.runs.run_directory import RunDirectory, open_run
from laser_fast.runs.tensorboard_log import require_tensorboard
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
    first = processes.first
    with ExitStack() as stack:
        with processes.together():  # before minutes of loading
            run = stack.enter_context(open_run(config.output, config, resume=resume and first, writes=first))
        set_seed(config.training.seed)
        inputs = load_inputs(config)
        model = _build(config, inputs, accelerator.device)
        with processes.together():
            run.begin(tensorboard=config.training.tensorboard)
        if not run.finished:
            session = Session(
                config=config,
                inputs=inputs,
                model=model,
                rows=laser_rows(config, inputs, warn=first),
                run=run,
                accelerator=accelerator,
                processes=processes,
                interruption=Interruption(processes),
                fingerprint=fingerprint(inputs),
                progress=progress and first,
                plan=partial(one_line, config, on_gpu=accelerator.device.type == "cuda"),
            )
            _train(session, resume)
        elif progress and first:
            print(f"{config.output} is finished: nothing is left to train", flush=True)
    return restore(model.eval(), inputs, find_run(run.checkpoint)), inputs


def is_finished(config: LaserConfig) -> bool:
    """Whether the run in `config.output`, which must fit the configuration, came to its end; loads nothing."""
    finished = RunDirectory(config.output, config, resume=True, writes=False).finished
    if finished and launched_first():
        with open_run(config.output, config, resume=True):
            pass  # it is tidied up
    return finished


def fingerprint(inputs: Inputs) -> dict[str, str]:
    """SHA-256 of what a run is trained on, by its name in a message."""
    folds = getattr(inputs.recommender, "cross_fitted", None)
    recommenders = [inputs.recommender, *(() if folds is None else folds.models)]
    hashes = " ".join(str(weights_hash(recommender)) for recommender in recommenders)
    return {"split": inputs.split.hash, "item map": inputs.dataset.items.hash(), "recommender": hashes}


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


def _build(config: LaserConfig, inputs: Inputs, device: torch.device) -> LaserModel:
    model = build_laser(config, inputs, *load_language_model(config.lm)).to(device)
    if model.mformer is not None and config.mformer.initialize_from is not None:
        initialize_qformer(model.mformer.qformer, load_bert(config.mformer.initialize_from, model.mformer.qformer))
    if model.text is not None and config.text.initialize_from is not None:
        initialize_text(model, config.text.initialize_from)
    return model


def _train(session: Session, resume: bool) -> None:
    """Everything between the first step and the last."""
    processes = session.processes
    if processes.rank:  # dropout of its share is independent of that of the others
        seeds = np.random.SeedSequence([session.config.training.seed, processes.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
    session.model.encode_within(_token_budget(session))
    names = list(_STAGES)
    if resume and (state := session.run.go_on("train_laser", session.fingerprint, processes.wait)) is not None:
        session.resumed, position = state, state.values["position"]
        names = names[names.index(position["stage"]) :]
        if session.progress:
            print(f"goes on after step {position['step']} of {position['stage']}", flush=True)
    with session.interruption:
        for name in names:
            _STAGES[name](session)
    session.run.finish()
    session.run.states.clear()
    processes.wait()


def _token_budget(session: Session) -> TokenBudget:
    """One budget for training and for encoding; the log tells when it is lowered."""
    training = session.config.training

    def log(shortage: Shortage) -> None:
        values = {"failed_tokens": shortage.tokens, "failed_rows": shortage.rows, "encoding": shortage.encoding}
        session.run.log(stage="out_of_memory", **values, micro_batch_tokens=budget.limit)

    on_gpu = session.accelerator.device.type == "cuda"
    explain = explain_shortage(session.config, on_gpu=on_gpu, plan=session.plan)
    budget = TokenBudget(training.micro_batch_tokens, halve=training.halve_on_oom, explain=explain, on_halving=log)
    return budget
