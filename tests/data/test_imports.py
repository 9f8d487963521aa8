"""The data room stands apart: it needs neither torch nor transformers."""

from collections.abc import Callable
from typing import Any

import pytest

from laser_fast import data
from laser_fast.data import loading


def test_importing_the_room_imports_no_torch(in_fresh_python: Callable[..., Any]) -> None:
    code = (
        "import sys, laser_fast.data; print(sorted({'torch', 'transformers', 'triton', 'pandas'} & set(sys.modules)))"
    )
    assert in_fresh_python(code).stdout == "[]\n"


def test_what_needs_torch_is_fetched_at_first_use() -> None:
    assert data.NextItemCollator is loading.NextItemCollator and data.NextItemDataset is loading.NextItemDataset
    with pytest.raises(AttributeError, match="module 'laser_fast.data' has no attribute 'Nothing'"):
        data.Nothing  # noqa: B018
