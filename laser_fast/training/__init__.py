"""Training: Laser in its stages, and the ID-based recommender it reads. Names are fetched at first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laser_fast.training.recommender.train_recommender import train_recommender
    from laser_fast.training.refresh_callback import RefreshItems
    from laser_fast.training.train import train_laser

__all__ = ["RefreshItems", "train_laser", "train_recommender"]

_HOME_OF = {
    "RefreshItems": "laser_fast.training.refresh_callback",
    "train_laser": "laser_fast.training.train",
    "train_recommender": "laser_fast.training.recommender.train_recommender",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
