"""The data room stands apart: it needs neither torch nor transformers."""

from collections.abc import Callable
from typing import Any


def test_importing_the_room_imports_no_torch(in_fresh_python: Callable[..., Any]) -> None:
    code = (
        "import sys, laser_fast.data; print(sorted({'torch', 'transformers', 'triton', 'pandas'} & set(sys.modules)))"
    )
    assert in_fresh_python(code).stdout == "[]\n"
