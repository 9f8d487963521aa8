"""Models that are ready to answer."""

from collections.abc import Callable
from typing import Any

import pytest

from laser_fast.laser import LaserModel


@pytest.fixture
def ready_laser(make_laser: Callable[..., Any]) -> Callable[..., LaserModel]:
    """`ready_laser(lm, **sections)`: as `make_laser`, in evaluation mode and with an item matrix."""

    def make(lm: str = "bert", **sections: Any) -> LaserModel:
        model: LaserModel = make_laser(lm, **sections)[0].eval()
        model.refresh_items()
        return model

    return make


@pytest.fixture
def model(ready_laser: Callable[..., LaserModel]) -> LaserModel:
    """A ready Laser around the tiny BERT."""
    return ready_laser()
