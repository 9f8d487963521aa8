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
    """The run directory of a recommender, for the one process that has claimed it; without a folder nothing is kept.

    Args:
        directory: of the run; None = none.
        fingerprint: what the recommender is fitted to, by its name in a message.

    Attributes:
        interruption: stops an epoch, which is taken again from its start.
        resumed: the state to go on from, until the stage it belongs to has taken it up.
    """

    def __init__(self, directory: RunDirectory | None = None, fingerprint: dict[str, Any] | None = None) -> None:
        self.directory = directory
        self.fingerprint = {} if fingerprint is None else fingerprint
        self.interruption = Interruption()
        self.resumed: State | None = None
        self._states = None if directory is None else StateFolder(directory)

    @property
    def finished(self) -> bool:
        """Whether the recommender is there already."""
        return self.directory is not None and self.directory.checkpoint.is_dir()

    def go_on(self) -> None:
        """Find the state to go on from and put back the log that belongs to it; of a finished run nothing is touched.

        Raises:
            ValueError: all states are damaged, or the run began with something else.
        """
        assert self.directory is not None and self._states is not None
        if self.finished:
            began = read_facts(self.directory.checkpoint).get("began", {})
            refuse_another_beginning("train_recommender", began, self.fingerprint)
            return
        self.resumed = self._states.newest()
        if self.resumed is None:
            warnings.warn(f"train_recommender: {self.directory.path} has no state yet; it begins anew", stacklevel=5)
        else:
            began = self.resumed.values["position"]["fingerprint"]
            refuse_another_beginning("train_recommender", began, self.fingerprint)
        self._states.put_back_files()

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.directory is not None:
            self.directory.log(**values)

    def keep(self, stage: str, epoch: int, fitting: Fitting, **parts: State) -> None:
        """Save the state before `epoch` of a stage; if a signal came, stop here.

        Args:
            parts: what the stage, or one after it, depends on beside its fitting.

        Raises:
            Interrupted: a signal came.
        """
        if self.directory is None or self._states is None:
            return
        position = {
            "stage": stage,
            "epoch": epoch,
            "step": fitting.step,
            "log_bytes": len(self.directory.read_log()),
            "fingerprint": self.fingerprint,
        }
        random = State(RandomState.now(fitting.device).of_torch().tensors)  # nothing else is drawn from
        self._states.save(State.join(position=State(values=position), fitting=fitting.state(), random=random, **parts))
        self.interruption.check()

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
        if self.directory is None or self._states is None:
            return
        if not self.finished:
            save_recommender(model, self.directory.checkpoint, began=self.fingerprint)
        self._states.clear()


@contextmanager
def open_run(
    path: str | Path | None, config: RecommenderConfig, fingerprint: dict[str, Any], *, resume: bool
) -> Iterator[RecommenderRun]:
    """Claim the folder, make or open the run in it, and take note of signals meanwhile.

    Raises:
        FileExistsError, FileNotFoundError: see `RunDirectory`.
        ValueError: see `RunDirectory`, `RecommenderRun.go_on` and `claim`; or a run is to be resumed without a path.
    """
    if path is None:
        if resume:
            raise ValueError("train_recommender: run_dir must be given to resume a run, got None")
        yield RecommenderRun()
        return
    with claim(Path(path).resolve()):
        run = RecommenderRun(RunDirectory(path, config, resume=resume), fingerprint)
        if resume:
            run.go_on()
        with run.interruption:
            yield run
