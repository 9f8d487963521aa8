"""A run directory, read and written; `Run` is fetched at first use (PEP 562)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laser_fast.runs.checkpoint import Run

__all__ = ["Run"]


def __getattr__(name: str) -> Any:
    if name != "Run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from laser_fast.runs.checkpoint import Run

    return Run
