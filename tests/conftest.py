"""What every test relies on: Triton's interpreter where there is no GPU, poisoned fresh memory, the marker `gpu`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# a look at device files: asking torch would start CUDA while tests are collected
_HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()

if not _HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN (integers: the largest), so that a result nobody wrote cannot look right."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill_before


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
