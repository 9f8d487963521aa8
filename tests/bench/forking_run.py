"""bench/gpu_run.py with every item in a fork of one process, which imports torch and transformers once for all ten."""

import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from gpu import process, run
from gpu.work import Order

OF_ITEMS = ("bitsandbytes", "hypothesis.strategies", "laser_fast.laser.build", "pytest")
for name in ("transformers.models.llama.modeling_llama", *OF_ITEMS):
    importlib.import_module(name)


class Fork:
    """The part of `subprocess.Popen` that the scheduler needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


def start(items: str, order: Order, log: Path, environment: Mapping[str, str]) -> tuple[Fork, int]:
    """In place of `gpu.process._start`; the environment is the one that this process has."""
    reading, writing = os.pipe()
    parent = os.getpid()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            os.setsid()
            with log.open("ab") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            sys.stdin = io.StringIO(json.dumps(asdict(order)))
            process.main(items, writing, parent)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    return Fork(pid), reading


process._start = start
sys.exit(run.main(sys.argv[1:]))
