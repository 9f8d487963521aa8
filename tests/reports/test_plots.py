"""Plots: names never touch, files are pictures, the same data give the same bytes."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from laser_fast.reports.plots import Line, bars, curves, dots, over_epochs, paired_bars, ratios, spread

pytest.importorskip("matplotlib")

NAN = float("nan")
ODD = "\x1b\x00\u202e<b>$\\frac{1}$"  # what no XML may hold, and a formula that is none
PLOTS: dict[str, Callable[[], bytes]] = {
    "curves": lambda: curves(
        [Line("a", [4, 8], [2.0, 1.0], [2.5, 2.0]), Line("b", [4, 8], [2.0, NAN])], "steps", "loss"
    ),
    "one point": lambda: curves([Line(ODD, [4], [2.0])], "steps", "loss"),
    "epochs": lambda: over_epochs([ODD, "A1"], [("", [0.1, 0.2])], "NDCG@10", marked=1),
    "many experts": lambda: over_epochs(
        [f"A{epoch}" for epoch in range(30)],
        [(f"expert {number}", [number + 0.1 * epoch for epoch in range(30)]) for number in range(16)],
        "load",
        level=(8.0, ODD),
    ),
    "bars": lambda: bars([ODD, "A2"], [900.0, 1000.0], "tokens"),
    "paired bars": lambda: paired_bars([ODD, "y"], [("a", [0.2, 0.8]), ("b", [0.5, 0.5])], "share", (0.5, "balanced")),
    "dots": lambda: dots([ODD, "y"], [("a", [0.2, NAN], [0.1, NAN]), ("b", [0.0, 0.1], [0.1, NAN])], "NDCG@10"),
    "ratios": lambda: ratios([ODD], ["1", "2"], np.array([[0.0, 2.5]]), np.array([[True, False]]), "expert"),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_picture_and_depends_on_its_data_alone(name: str) -> None:
    svg = PLOTS[name]()
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and float(root.attrib["width"].removesuffix("pt")) > 300
    assert b"<script" not in svg and b"<dc:date>" not in svg
    assert PLOTS[name]() == svg


@pytest.mark.parametrize("heights", [[0.1, 0.11, 0.12], [0.9, 0.95, 0.99, 1.0], [0.0], [0.2, 0.8], [0.5] * 8])
def test_names_are_kept_apart(heights: list[float]) -> None:
    places = spread(heights, 0.1)
    assert all(above - below >= 0.1 - 1e-9 for below, above in pairwise(places))
    assert max(places) <= 1.0 and min(places) >= -1e-9
    if all(above - below >= 0.1 for below, above in pairwise(heights)):
        assert places == heights  # nothing moves without need
