"""What every section is given: device, sizes, a folder for files, roofs measured once, and how long it may take."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic

import torch
from timing import Clock, wall_clock

from reporting.roofs import Roofs, measure_roofs
from reporting.settings import Settings

BENCH = Path(__file__).resolve().parents[1]
GIB = 2**30


class Deadline:
    """A moment at which a section has to come to an end.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until then; 0 where it is over."""
        return max(0.0, self._end - monotonic())

    def rounds(self, round_s: float, most: int) -> int:
        """How many of `most` rounds of so many seconds fit in, after one to warm up; at least one."""
        return max(1, min(most, int(self.left_s / max(round_s, 1e-9)) - 1))

    @property
    def over(self) -> bool:
        """Whether nothing new may begin."""
        return self.left_s == 0.0


@dataclass
class Context:
    """Shared by all sections of one report.

    Attributes:
        device: that everything runs on.
        settings: sizes.
        folder: for files that are not part of the report; removed afterwards.
    """

    device: torch.device
    settings: Settings
    folder: Path

    @cached_property
    def roofs(self) -> Roofs:
        """Measured at the first use, so that every section has them whichever were chosen."""
        return measure_roofs(self.device, self.settings.copy_floats, self.settings.matmul_size)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def clock(self) -> Clock:
        """Seconds from an idle device to an idle device."""
        return wall_clock(torch.cuda.synchronize) if self.on_gpu else wall_clock()

    @property
    def device_class(self) -> str | None:
        """For which of the predicted devices this one may stand; None = for none."""
        name = torch.cuda.get_device_name() if self.on_gpu else ""
        return next((known for known in ("H100", "4090") if known in name), None)


def run_script(words: Sequence[str], timeout_s: float) -> str:
    """Run `python WORDS` with this folder's modules at hand; what it printed on stdout.

    Raises:
        subprocess.TimeoutExpired: it took longer.
        RuntimeError: it failed; with the end of what it said.
    """
    known = [str(Path(part).resolve()) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH), *known])}
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise RuntimeError(f"run_script: {words[0]} must end with status 0, got {done.returncode}: {said[-1]}")
    return done.stdout


def package_missing(name: str) -> bool:
    """Whether a top-level package is not installed; it is looked up, not imported."""
    from importlib.util import find_spec

    return find_spec(name) is None
