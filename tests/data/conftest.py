"""What the tests of data share: a Python started anew, the data sets beside the checkout."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def in_fresh_python() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run code, with arguments, in a Python that imports what this one does."""

    def run(code: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Folder of a data set that is not part of the repository; the test is skipped where it is missing."""

    def find(name: str) -> Path:
        beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
        folder = Path(os.environ.get("LASER_FAST_SHARED_DATA", beside)) / name
        if not folder.is_dir():
            pytest.skip(f"needs the data set {name}: set LASER_FAST_SHARED_DATA to the folder that holds it")
        return folder

    return find
