"""laser_fast: a frozen language model as a sequential recommender, with fused GPU operations.

Importing this package imports neither Triton, nor bitsandbytes, nor the compiled library, starts no CUDA context and
changes nothing in other libraries. The names below are fetched from their rooms at first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laser_fast.config import LaserConfig
    from laser_fast.data import SequenceDataset
    from laser_fast.evaluation import evaluate
    from laser_fast.laser import LaserModel
    from laser_fast.planning.plan import estimate_memory
    from laser_fast.recommenders import SASRec

__version__ = "0.1.0"

__all__ = ["LaserConfig", "LaserModel", "SASRec", "SequenceDataset", "__version__", "estimate_memory", "evaluate"]

_ROOM_OF = {
    "LaserConfig": "laser_fast.config",
    "LaserModel": "laser_fast.laser",
    "SASRec": "laser_fast.recommenders",
    "SequenceDataset": "laser_fast.data",
    "estimate_memory": "laser_fast.planning.plan",
    "evaluate": "laser_fast.evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOM_OF})
