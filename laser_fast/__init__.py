"""laser_fast: a frozen language model as a sequential recommender, with fused GPU operations.

Importing this package imports neither Triton, nor bitsandbytes, nor the compiled library, starts no CUDA context and
changes nothing in other libraries. The names below are fetched from their rooms at first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laser_fast.config import LaserConfig, RecommenderConfig
    from laser_fast.data import SequenceDataset
    from laser_fast.data.loading import NextItemCollator, NextItemDataset
    from laser_fast.evaluation import evaluate
    from laser_fast.laser import LaserModel
    from laser_fast.planning.plan import estimate_memory
    from laser_fast.recommenders import SASRec
    from laser_fast.runs.checkpoint import Run
    from laser_fast.training.recommender.train_recommender import train_recommender
    from laser_fast.training.refresh_callback import RefreshItems
    from laser_fast.training.train import train_laser

__version__ = "0.2.0"

_HOME_OF = {
    "LaserConfig": "config",
    "LaserModel": "laser",
    "NextItemCollator": "data.loading",
    "NextItemDataset": "data.loading",
    "RecommenderConfig": "config",
    "RefreshItems": "training.refresh_callback",
    "Run": "runs.checkpoint",
    "SASRec": "recommenders",
    "SequenceDataset": "data",
    "estimate_memory": "planning.plan",
    "evaluate": "evaluation",
    "train_laser": "training.train",
    "train_recommender": "training.recommender.train_recommender",
}

__all__ = [
    "LaserConfig",
    "LaserModel",
    "NextItemCollator",
    "NextItemDataset",
    "RecommenderConfig",
    "RefreshItems",
    "Run",
    "SASRec",
    "SequenceDataset",
    "__version__",
    "estimate_memory",
    "evaluate",
    "train_laser",
    "train_recommender",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"laser_fast.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
