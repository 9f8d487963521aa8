"""What the fitting of a recommender writes on the way, and where one that was stopped goes on.

A state is kept after every epoch, of the model itself (stage `model`) and of each fold (`fold0`, ...); a run that goes
on from it is, on a CPU, bit by bit the run that never stopped. The checkpoint comes last: where it is, all is done.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laser_fast.config import RecommenderConfig
from laser_fast.files.claims import claim
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.recommender_files import read_facts, save_recommender
from laser_fast.runs.resume import State, StateFolder, refuse_another_beginning
from laser_fast.runs.run_directory import RunDirectory
from laser_fast.training.interruption import Interruption
from laser_fast.training.random_state import RandomState
from laser_fast.training.recommender.fit import Fitting


class RecommenderRun:
    """The fitting of a recommender without a folder: nothing is kept.

    Attributes:
        checkpoint: the finished recommender; None = there is none yet.
        interruption: stops an epoch, which is taken again from its start.
        resumed: the state to go on from, until the stage it belongs to has taken it up.
    """

    checkpoint: Path | None = None
    resumed: State | None = None

    def __init__(self) -> None:
        self.interruption = Interruption()

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""

    def keep(self, stage: str, epoch: int, fitting: Fitting, **parts: State) -> None:
        """Save the state before `epoch` of a stage, with `parts` it depends on; if a signal came, stop here.

        Raises:
            Interrupted: a signal came.
        """

    def take_up(self, stage: str, fitting: Fitting) -> State | None:
        """Let the fitting of a stage go on if the run stands in it; what was kept with it, None at its start."""
        state = self.resumed
        if state is None or state.values["position"]["stage"] != stage:
            return None
        self.resumed = None
        fitting.load_state(state.part("fitting"))
        RandomState(fitting.device, state.part("random").tensors).put_back()
        return state

    def finish(self, model: PackedRecommender) -> None:
        """Save the recommender; the states have done their duty."""


class _KeptRun(RecommenderRun):
    """A run with a folder, for the one process that has claimed it."""

    def __init__(self, directory: RunDirectory, fingerprint: dict[str, Any], *, resume: bool) -> None:
        super().__init__()
        self.directory = directory
        self.fingerprint = fingerprint
        self.states = StateFolder(directory)
        self.checkpoint = directory.checkpoint if directory.checkpoint.is_dir() else None
        if resume:
            self._go_on()

    def _go_on(self) -> None:
        """Find the state to go on from and put back its log; a finished run stays as it is."""
        if self.checkpoint is not None:
            refuse_another_beginning(
                "train_recommender", read_facts(self.checkpoint).get("began", {}), self.fingerprint
            )
            return
        self.resumed = self.states.newest()
        if self.resumed is None:
            warnings.warn(f"train_recommender: {self.directory.path} has no state yet; it begins anew", stacklevel=6)
        else:
            began = self.resumed.values["position"]["fingerprint"]
            refuse_another_beginning("train_recommender", began, self.fingerprint)
        self.states.put_back_files()

    def log(self, **values: Any) -> None:
        self.directory.log(**values)

    def keep(self, stage: str, epoch: int, fitting: Fitting, **parts: State) -> None:
        position = {
            "stage": stage,
            "epoch": epoch,
            "step": fitting.step,
            "log_bytes": len(self.directory.read_log()),
            "fingerprint": self.fingerprint,
        }
        random = State(RandomState.now(fitting.device, python=False).tensors)  # nothing else is drawn from
        self.states.save(State.join(position=State(values=position), fitting=fitting.state(), random=random, **parts))
        self.interruption.check()

    def finish(self, model: PackedRecommender) -> None:
        if self.checkpoint is None:
            save_recommender(model, self.directory.checkpoint, began=self.fingerprint)
        self.states.clear()


@contextmanager
def open_run(
    path: str | Path | None, config: RecommenderConfig, fingerprint: dict[str, Any], *, resume: bool
) -> Iterator[RecommenderRun]:
    """Claim the folder, make or open the run in it, and take note of signals meanwhile.

    Args:
        path: None = nothing is kept.
        fingerprint: what the recommender is fitted to, by its name in a message.

    Raises:
        FileExistsError, FileNotFoundError: see `RunDirectory`.
        ValueError: see `RunDirectory` and `claim`; the run began with something else; all its states are damaged; or a
            run is to be resumed without a path.
    """
    if path is None:
        if resume:
            raise ValueError("train_recommender: run_dir must be given to resume a run, got None")
        yield RecommenderRun()
        return
    with claim(Path(path).resolve()):
        run = _KeptRun(RunDirectory(path, config, resume=resume), fingerprint, resume=resume)
        with run.interruption:
            yield run
