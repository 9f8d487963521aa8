"""Commands in processes of their own, which several test files start."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_PATIENCE_S = 120.0  # for one job; each takes a few seconds
_SCRIPT = Path(__file__).with_name("several_processes.py")


class Jobs:
    """Runs jobs in processes that are forked from one, which has imported everything; see `several_processes`."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, ranks: int, folder: Path, **request: Any) -> list[int]:
        """Exit statuses; a job that hangs gives none."""
        folder.mkdir(exist_ok=True)
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({"ranks": ranks, "folder": str(folder), **request}) + "\n")
        self._server.stdin.flush()
        # the server and its forks, which would keep the pipe open
        watchdog = threading.Timer(_PATIENCE_S, os.killpg, (self._server.pid, signal.SIGKILL))
        watchdog.start()
        try:
            return list(json.loads(self._server.stdout.readline()))
        finally:
            watchdog.cancel()

    def train(
        self,
        ranks: int,
        settings: dict[str, Any],
        run: Path,
        *more: str,
        disturb: tuple[int, int, str] | None = None,
        **when: Any,
    ) -> list[int]:
        """`laser-fast train` into `run`; disturb = rank, call of its loss, how."""
        file = run.with_suffix(".yaml")
        file.write_text(json.dumps({**settings, "output": str(run)}))
        what = None if disturb is None else dict(zip(("rank", "call", "how"), disturb, strict=True))
        return self.run(ranks, run.with_suffix(".notes"), arguments=["train", str(file), *more], disturb=what, **when)

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="session")
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()
