"""The log of a run for TensorBoard: scalars over the steps of each stage."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_fast.files.atomic import remove

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_NOT_SCALARS = ("stage", "epoch", "step", "best")


class TensorBoardLog:
    """Keeps a folder of TensorBoard's event files equal to a log of JSON lines.

    New lines are appended. When the log does not continue what was written (the run goes on in another process, or from
    an earlier state) the folder is made anew, so that nothing is there twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        self._written = b""

    def follow(self, log: bytes) -> None:
        """Bring the event files up to `log`, the whole content of metrics.jsonl."""
        if self._writer is None or not log.startswith(self._written):
            from torch.utils.tensorboard import SummaryWriter

            self.close()
            remove(self.folder)
            self._writer = SummaryWriter(str(self.folder))
        for line in log[len(self._written) :].splitlines():
            values = json.loads(line)
            for tag, value in scalars(values):
                self._writer.add_scalar(tag, value, global_step=values.get("step", 0))
        self._writer.flush()
        self._written = log

    def close(self) -> None:
        """End the event file; the next `follow` begins anew."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._written = b""


def scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tag and value of every number in the line of an epoch: `STAGE/NAME`, `STAGE/load/expert_N` counted from 1."""
    if "epoch" not in values:
        return
    for name, value in values.items():
        tag = f"{values['stage']}/{name.replace('@', '_at_')}"
        if isinstance(value, list):
            yield from ((f"{tag}/expert_{number}", float(part)) for number, part in enumerate(value, start=1))
        elif name not in _NOT_SCALARS and isinstance(value, int | float):
            yield tag, float(value)


def require_tensorboard() -> None:
    """Raise ImportError without the package `tensorboard`."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "require_tensorboard: training.tensorboard needs the package tensorboard, got none; "
            'pip install "laser-fast[tensorboard]" or set training.tensorboard to false'
        )
