"""What every section is given: device, sizes, a folder for files, limits of the device, and how long it may take."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic

import torch
from roofline import Roofs, measure_roofs
from timing import Clock, idle_clock

from reporting.settings import Settings

BENCH = Path(__file__).resolve().parents[1]


class Deadline:
    """The moment, so many seconds from now, at which a section has to come to an end."""

    def __init__(self, seconds: float) -> None:
        self._end = monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until then; 0 where it is over."""
        return max(0.0, self._end - monotonic())

    @property
    def over(self) -> bool:
        """Whether nothing new may begin."""
        return self.left_s == 0.0

    def rounds(self, round_s: float, most: int) -> int:
        """How many of `most` rounds of so many seconds fit in, after one to warm up; at least one."""
        return max(1, min(most, int(self.left_s / max(round_s, 1e-9)) - 1))


@dataclass
class Context:
    """Shared by all sections of one report.

    Attributes:
        folder: for files that are not part of the report; removed afterwards.
        known_roofs: of this device, where they were measured before.
    """

    device: torch.device
    settings: Settings
    folder: Path
    known_roofs: Roofs | None = None

    @cached_property
    def roofs(self) -> Roofs:
        """Measured at the first use, so that every section has them whichever were chosen."""
        return self.known_roofs or measure_roofs(self.device, self.settings.copy_floats, self.settings.matmul_size)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def clock(self) -> Clock:
        """Seconds from an idle device to an idle device."""
        return idle_clock(self.device)

    @property
    def device_class(self) -> str | None:
        """Which of the devices that were predicted for this one is; None = none of them."""
        name = torch.cuda.get_device_name() if self.on_gpu else ""
        return next((known for known in ("H100", "4090") if known in name), None)


def run_script(words: Sequence[str], timeout_s: float) -> str:
    """Run `python WORDS` with the modules of bench/ at hand; what it printed on stdout.

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
