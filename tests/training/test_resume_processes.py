"""Runs that the system ends: killed at random moments, or terminated as a scheduler does it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Same = Callable[[Path, Path], None]

_PATIENCE_S = 120.0  # for one run; each takes a few seconds
_SERVER = """
import json, os, sys, threading, time
import torch
from tqdm import tqdm
from laser_fast.cli import main
from laser_fast.runs.resume import StateFolder
tqdm.set_lock(threading.RLock())  # its own is shared by all forks: one that is killed holding it stops the others
torch.set_num_threads(1)  # no pool of threads that a fork would lose
StateFolder.clear = lambda self: None  # they are compared
def run(arguments, output):
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    return main(arguments)
answers = sys.stdout
def ready(request):
    if request["beyond"] is None:
        return os.path.exists(request["wait_for"])
    names = os.listdir(request["wait_for"]) if os.path.exists(request["wait_for"]) else []
    return any(name > request["beyond"] for name in names if name[0].isdigit())
for line in sys.stdin:
    request = json.loads(line)
    if request["here"]:
        status = run(request["arguments"], request["output"])
    else:
        child = os.fork()
        if child == 0:
            sys.exit(run(request["arguments"], request["output"]))
        ended = 0
        while request["signal"] and not ended and not ready(request):
            time.sleep(0.005)
            ended, status = os.waitpid(child, os.WNOHANG)
        if request["signal"] and not ended:
            time.sleep(request["after_s"])
            os.kill(child, request["signal"])  # should it have ended by now, it is still to be waited for
        if not ended:
            status = os.waitpid(child, 0)[1]
        status = os.waitstatus_to_exitcode(status)
    print(status, file=answers, flush=True)
"""


class Command:
    """`laser-fast` in processes of their own, forked from one that has done it all before: no time goes to imports.

    Attributes:
        printed: what the last run wrote.
        whole: the run that nothing stopped.
    """

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.printed, self.whole = folder / "printed", folder / "whole"
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        file = folder / "whole.yaml"
        file.write_text(json.dumps({**settings, "output": str(self.whole)}))
        assert self.run("train", str(file), here=True) == 0

    def run(self, *arguments: str, here: bool = False, **when: Any) -> int:
        """Exit status of a run; `when` it gets the signal `number`: `after_s` s after `wait_for` is there.

        With `beyond` that is a folder, and what is waited for is an entry with a later name.
        """
        request = {"signal": when.get("number", 0), "after_s": when.get("after_s", 0.0), "beyond": when.get("beyond")}
        request |= {"arguments": arguments, "output": str(self.printed), "here": here}
        request["wait_for"] = str(when.get("wait_for"))
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        # then the answer is an empty line, which is no int; a fork that hangs would keep the pipe open
        watchdog = threading.Timer(_PATIENCE_S, os.killpg, (self._server.pid, signal.SIGKILL))
        watchdog.start()
        try:
            return int(self._server.stdout.readline())
        finally:
            watchdog.cancel()

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def command(staged_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    command = Command(staged_settings, tmp_path_factory.mktemp("command"))
    yield command
    command.close()


def test_kills_at_random_moments_change_nothing(
    staged_settings: dict[str, Any], assert_same_run: Same, tmp_path: Path, command: Command
) -> None:
    seed, training = 0, {**staged_settings["training"], "save_steps": 1}
    generator, moments, runs = np.random.default_rng(seed), [], [tmp_path / "run-0"]
    while len(moments) < 20:
        run, file = runs[-1], runs[-1].with_suffix(".yaml")
        file.write_text(json.dumps({**staged_settings, "output": str(run), "training": training}))
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        after_s, states = float(generator.uniform(0.0, 0.1)), run / "states"
        beyond = (
            max((entry.name for entry in states.iterdir() if entry.name[0].isdigit()), default="") if resume else ""
        )
        if generator.random() < 0.2:  # as soon as the files are put back, else when training got on by a step
            (run / "metrics.jsonl").unlink(missing_ok=True)
            when: dict[str, Any] = {"wait_for": run / "metrics.jsonl"}
        else:
            when = {"wait_for": states, "beyond": beyond}
        status = command.run("train", str(file), *resume, number=9, after_s=after_s, **when)
        moments.append((run.name, beyond, after_s))
        assert status in (-9, 0), f"seed {seed}, {moments}: {command.printed.read_text()}"
        if status == 0 or (run / "finished.json").exists():
            runs.append(tmp_path / f"run-{len(runs)}")
    stages = {stage for stage in ("pretrain", "phase_a", "phase_b") if any(stage in beyond for _, beyond, _ in moments)}
    assert len(stages) == 3, f"seed {seed}, {moments}"
    if (runs[-1] / "config.yaml").exists():
        assert command.run("train", str(runs[-1].with_suffix(".yaml")), "--resume") == 0, f"seed {seed}, {moments}"
    for run in runs[: None if runs[-1].exists() else -1]:
        try:
            assert_same_run(run, command.whole)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {moments}") from error


def test_a_terminated_command_says_how_to_go_on(
    staged_settings: dict[str, Any], assert_same_run: Same, tmp_path: Path, command: Command
) -> None:
    run, file = tmp_path / "run", tmp_path / "my run.yaml"
    file.write_text(json.dumps({**staged_settings, "output": "set below"}))
    arguments = ["train", str(file), "--set", f"output={run}"]
    assert command.run(*arguments, number=signal.SIGTERM, wait_for=run / "metrics.jsonl") == 143
    again = f"stopped by SIGTERM; go on with: laser-fast train '{file}' --set output={run} --resume"
    assert command.printed.read_text().splitlines()[-1] == f"laser-fast: {again}"
    assert any((run / "states").iterdir())
    assert command.run(*arguments, "--resume") == 0
    assert_same_run(run, command.whole)
