"""The operations called with random arguments, right and wrong: tests/ops/fuzz_operations.py in a process of its own.

Lost is: an answer that is not the reference's, an error that is not documented, and a process that dies.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from attacking.attack import Scope
from attacking.children import Findings

_SCRIPT = Path(__file__).resolve().parents[2] / "tests" / "ops" / "fuzz_operations.py"
_CALLS = 10_000
_WHAT = "operations called with random arguments, right and wrong"


def attack(scope: Scope) -> None:
    """One line."""
    if not _SCRIPT.exists():
        scope.not_run("operations", _WHAT, f"there is no {_SCRIPT.name}")
        return
    words = [sys.executable, str(_SCRIPT), "--calls", str(scope.times(_CALLS)), "--seed", str(scope.seed)]
    begin, findings = time.monotonic(), Findings()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=scope.until - begin, check=False)
    except subprocess.TimeoutExpired as error:
        scope.not_run("operations", _WHAT, f"not over after {error.timeout:.0f} s")
        return
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        for outcome in ("answered", "refused"):
            findings.saw(outcome, found[outcome])
        wrong = found["wrong"]
    except (IndexError, ValueError, KeyError):
        wrong = 1
    if wrong or done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        findings.saw("otherwise", max(1, wrong))
        findings.lose(f"seed {scope.seed}: status {done.returncode}, {said[-300:]}", max(1, wrong))
    scope.report("operations", _WHAT, findings, time.monotonic() - begin)
