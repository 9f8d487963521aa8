"""Which measurements are furthest from what the device could do: read off the sections, not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from reporting.predictions import STEP_SHARE, STEP_SHARE_NF4

_LONG_STEP = 4096  # tokens from which the share of a step was predicted


class Gap(NamedTuple):
    """A measurement and its limit.

    Attributes:
        name: what was measured.
        share: reached of the limit.
        limit: which one.
        lost_us: microseconds of one run above the limit.
    """

    name: str
    share: float
    limit: str
    lost_us: float


class Missed(NamedTuple):
    """A prediction for this device that was not reached."""

    name: str
    figure: str
    measured: float
    predicted: float


def gaps(sections: Mapping[str, Mapping[str, Any]]) -> list[Gap]:
    """Every measurement that has a limit, the furthest from it first."""
    found = []
    for row in sections.get("kernels", {}).get("rows", []):
        share = row.get("share_of_limit")
        if share is not None:
            found.append(Gap(row["name"], share, f"measured roof ({row['limit']})", row["us"] * (1 - share)))
    for row in sections.get("step", {}).get("rows", []):
        if "share_of_floor" in row:
            share, name = row["share_of_floor"], f"step of {step_name(row)}"
            found.append(Gap(name, share, "FLOP floor", 1e6 * row["seconds"] * (1 - share)))
    return sorted(found, key=lambda gap: gap.share)


def missed(report: Mapping[str, Any]) -> list[Missed]:
    """Predictions for this class of device above what was measured; none where nothing was predicted for it."""
    device, sections = report["device_class"], report["sections"]
    found = []
    for row in sections.get("kernels", {}).get("rows", []):
        for known in row["predicted"]:
            if known["device"] == device and known["measured"] < known["value"]:
                found.append(Missed(row["name"], known["figure"], known["measured"], known["value"]))
    for row in sections.get("step", {}).get("rows", []):
        wanted = STEP_SHARE_NF4 if row["weights"] == "nf4" else STEP_SHARE
        long = row["tokens"] >= _LONG_STEP and row["checkpointing"] == "none" and "8b" in row["shape"]
        if long and wanted.device == device and row.get("share_of_floor", 1.0) < wanted.value:
            found.append(Missed(step_name(row), wanted.figure, row["share_of_floor"], wanted.value))
    for row in sections.get("waterfall", {}).get("cumulative", []):
        gain = row.get("gain")
        if device is not None and gain is not None and gain < row["predicted_gain"]:
            found.append(Missed(f"waterfall: {row['name']}", "gain", gain, row["predicted_gain"]))
    return sorted(found, key=lambda one: one.measured / one.predicted)


def step_name(row: Mapping[str, Any]) -> str:
    """A row of the step in a few words."""
    weights = "NF4" if row["weights"] == "nf4" else "not packed"
    mode = "" if row["checkpointing"] == "none" else f", {row['checkpointing']}"
    return f"{row['shape']}, {weights}, {row['tokens']} tokens{mode}"
