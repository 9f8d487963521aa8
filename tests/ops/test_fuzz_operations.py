"""Two thousand random calls of all operations, in a process of their own: none may crash, corrupt memory or lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).with_name("fuzz_operations.py")
CALLS = 2_000


@pytest.mark.slow
def test_random_calls_are_answered_rightly_or_refused_by_name() -> None:
    # memory that was freed or never written holds neither zeros nor what was there before
    environment = {**os.environ, "MALLOC_PERTURB_": "90", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FUZZER), "--calls", str(CALLS), "--seed", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    counts = json.loads(done.stdout)
    assert counts["answered"] + counts["refused"] == counts["calls"] == CALLS
    assert counts["wrong"] == 0 and min(counts["answered"], counts["refused"]) > CALLS // 5
