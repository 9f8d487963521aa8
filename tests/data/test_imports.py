"""The data room stands apart: it needs neither torch nor transformers."""

import os
import subprocess
import sys

import pytest

from laser_fast import data
from laser_fast.data import loading


def test_importing_the_room_imports_no_torch() -> None:
    code = (
        "import sys, laser_fast.data; print(sorted({'torch', 'transformers', 'triton', 'pandas'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_what_needs_torch_is_fetched_at_first_use() -> None:
    assert data.NextItemCollator is loading.NextItemCollator and data.NextItemDataset is loading.NextItemDataset
    with pytest.raises(AttributeError, match="module 'laser_fast.data' has no attribute 'Nothing'"):
        data.Nothing  # noqa: B018
