"""Runs that the system ends: killed at random moments, or terminated as a scheduler does it."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Same = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def whole(jobs: Any, staged_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert jobs.train(0, staged_settings, run) == [0]
    return run


def test_kills_at_random_moments_change_nothing(
    jobs: Any, staged_settings: dict[str, Any], assert_same_run: Same, tmp_path: Path, whole: Path
) -> None:
    settings = {**staged_settings, "training": {**staged_settings["training"], "save_steps": 1}}
    seed, moments, runs = 0, [], [tmp_path / "run-0"]
    generator = np.random.default_rng(seed)
    while len(moments) < 20:
        run, states = runs[-1], runs[-1] / "states"
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        after_s, names = float(generator.uniform(0.0, 0.1)), states.iterdir() if resume else iter(())
        beyond = max((entry.name for entry in names if entry.name[0].isdigit()), default="")
        end: dict[str, Any] = {"number": 9, "after_s": after_s, "wait_for": str(states), "beyond": beyond}
        if generator.random() < 0.2:  # as soon as the files are put back, else when training got on by a step
            (run / "metrics.jsonl").unlink(missing_ok=True)
            end |= {"wait_for": str(run / "metrics.jsonl"), "beyond": None}
        (status,) = jobs.train(1, settings, run, *resume, end=end)
        moments.append((run.name, beyond, after_s))
        printed = run.with_suffix(".notes") / "printed-0"
        assert status in (-9, 0), f"seed {seed}, {moments}: {printed.read_text()}"
        if status == 0 or (run / "finished.json").exists():
            runs.append(tmp_path / f"run-{len(runs)}")
    stages = {stage for stage in ("pretrain", "phase_a", "phase_b") if any(stage in beyond for _, beyond, _ in moments)}
    assert len(stages) == 3, f"seed {seed}, {moments}"
    if (runs[-1] / "config.yaml").exists():
        assert jobs.train(1, settings, runs[-1], "--resume") == [0], f"seed {seed}, {moments}"
    for run in runs[: None if runs[-1].exists() else -1]:
        try:
            assert_same_run(run, whole)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {moments}") from error


def test_a_terminated_command_says_how_to_go_on(
    jobs: Any, staged_settings: dict[str, Any], assert_same_run: Same, tmp_path: Path, whole: Path
) -> None:
    run, named = tmp_path / "my run", tmp_path / "set"
    end = {"number": signal.SIGTERM, "after_s": 0.0, "wait_for": str(named / "metrics.jsonl"), "beyond": None}
    more = ["--set", f"output={named}"]
    assert jobs.train(1, staged_settings, run, *more, end=end) == [143]
    again = (
        f"stopped by SIGTERM; go on with: laser-fast train '{run.with_suffix('.yaml')}' --set output={named} --resume"
    )
    printed = (run.with_suffix(".notes") / "printed-0").read_text()
    assert printed.splitlines()[-1] == f"laser-fast: {again}"
    assert any((named / "states").iterdir())
    assert jobs.train(1, staged_settings, run, *more, "--resume") == [0]
    assert_same_run(named, whole)
