"""Item 9: all tests that need a GPU, four at a time; a line for every file of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gpu.work import Found, Work

_ROOT = Path(__file__).resolve().parents[3]
_AT_ONCE = 4


def names(rehearse: bool) -> list[str]:
    """Files with such tests, from tests/; of a rehearsal, where all of them are skipped, two."""
    folder = _ROOT / "tests"
    files = [file for file in sorted(folder.rglob("test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
    return [file.relative_to(folder).as_posix() for file in (files[:2] if rehearse else files)]


def run(work: Work) -> None:
    """By pytest-xdist where it is installed, else one after the other."""
    from gpu.testing import Outcome, run_tests

    def group(test: str) -> str | None:
        return test.partition("::")[0].removeprefix("tests/")

    def summary(outcomes: list[Outcome]) -> Found:
        skipped = {outcome.test: outcome.reason for outcome in outcomes if outcome.status == "skipped"}
        passed = len(outcomes) - len(skipped)
        return Found(passed, f"of {len(outcomes)} tests pass", more={"skipped": skipped} if skipped else {})

    at_once = 1 if work.rehearse else _AT_ONCE
    spread = ["-n", str(at_once), "--dist", "load"] if importlib.util.find_spec("xdist") else []
    run_tests(work, {name: f"tests/{name}" for name in work.wanted}, group, summary, options=["-m", "gpu", *spread])
