"""What the fitting of a recommender writes on the way, and where a stopped one goes on.

A state is kept after every epoch, of the model itself (stage `model`) and of each fold (`fold0`, ...); a run that goes
on from it is, on a CPU, bit by bit the run that never stopped. The checkpoint comes last: where it is, all is done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laser_fast.config import RecommenderConfig
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.recommender_files import read_facts, save_recommender
from laser_fast.runs.resume import State
from laser_fast.runs.run_directory import RunDirectory, open_run, refuse_another_beginning
from laser_fast.training.interruption import Interruption
from laser_fast.training.random_state import RandomState
from laser_fast.training.recommender.fit import Fitting


class RecommenderRun:
    """The fitting of a recommender in its folder; without a folder nothing is kept.

    Attributes:
        checkpoint: the finished recommender; None = there is none yet.
        interruption: stops an epoch, which is taken again from its start.
        resumed: the state to go on from, until the stage it belongs to has taken it up.
    """

    def __init__(self, directory: RunDirectory | None = None, fingerprint: dict[str, Any] | None = None) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.checkpoint: Path | None = None
        if directory is not None and directory.checkpoint.is_dir():
            self.checkpoint = directory.checkpoint
        self.interruption = Interruption()
        self.resumed: State | None = None

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.directory is not None:
            self.directory.log(**values)

    def keep(self, stage: str, epoch: int, fitting: Fitting, **parts: State) -> None:
        """Save the state before `epoch` of a stage, with `parts` it depends on; `Interrupted` if a signal came."""
        if self.directory is None:
            return
        position = {
            "stage": stage,
            "epoch": epoch,
            "step": fitting.step,
            "log_bytes": len(self.directory.read_log()),
            "fingerprint": self.fingerprint,
        }
        random = State(RandomState.now(fitting.device, python=False).tensors)  # nothing else is drawn from
        state = State.join(position=State(values=position), fitting=fitting.state(), random=random, **parts)
        self.directory.states.save(state)
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
        """Save the recommender and delete the states."""
        if self.directory is None:
            return
        if self.checkpoint is None:
            save_recommender(model, self.directory.checkpoint, began=self.fingerprint)
        self.directory.states.clear()


@contextmanager
def open_recommender_run(
    path: str | Path | None, config: RecommenderConfig, fingerprint: dict[str, Any], *, resume: bool
) -> Iterator[RecommenderRun]:
    """Claim the folder, make or open the run in it, and take note of signals meanwhile; path None = keep nothing.

    Args:
        fingerprint: what the recommender is fitted to, by its name in a message.
    """
    if path is None:
        if resume:
            raise ValueError("train_recommender: run_dir must be given to resume a run, got None")
        yield RecommenderRun()
        return
    with open_run(path, config, resume=resume) as directory:
        run = RecommenderRun(directory.begin(), fingerprint)
        if resume and run.checkpoint is not None:
            refuse_another_beginning("train_recommender", read_facts(run.checkpoint).get("began", {}), fingerprint)
        elif resume:
            run.resumed = directory.go_on("train_recommender", fingerprint)
        with run.interruption:
            yield run
