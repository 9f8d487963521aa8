"""The report as Markdown, and which of its measurements are furthest from what the device could do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from reporting.predictions import STEP_SHARE, STEP_SHARE_NF4
from reporting.tables import percent, plain, table

Text = Callable[[Mapping[str, Any]], list[str]]

_SHOWN = 10
_AFTER = {"step": ("roofline.png", "memory.png"), "waterfall": ("waterfall.png",)}
_LONG_STEP = 4096  # tokens from which the share of a step was predicted


class Gap(NamedTuple):
    """A measurement, the share of its limit that it reached, and the microseconds of one run above it."""

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
    for row in rows_of(sections, "kernels"):
        share = row.get("share_of_limit")
        if share is not None:
            found.append(Gap(row["name"], share, f"measured roof ({row['limit']})", row["us"] * (1 - share)))
    for row in rows_of(sections, "step"):
        if "share_of_floor" in row:
            share, name = row["share_of_floor"], f"step of {step_name(row)}"
            found.append(Gap(name, share, "FLOP floor", 1e6 * row["seconds"] * (1 - share)))
    return sorted(found, key=lambda gap: gap.share)


def missed(report: Mapping[str, Any]) -> list[Missed]:
    """Predictions for this class of device above what was measured; none where nothing was predicted for it."""
    device, sections = report["device_class"], report["sections"]
    found = []
    for row in rows_of(sections, "kernels"):
        for known in row["predicted"]:
            if known["device"] == device and known["measured"] < known["value"]:
                found.append(Missed(row["name"], known["figure"], known["measured"], known["value"]))
    for row in rows_of(sections, "step"):
        wanted = STEP_SHARE_NF4 if row["weights"] == "nf4" else STEP_SHARE
        long = row["tokens"] >= _LONG_STEP and row["checkpointing"] == "none" and "8b" in row["shape"]
        if long and wanted.device == device and row.get("share_of_floor", 1.0) < wanted.value:
            found.append(Missed(step_name(row), wanted.figure, row["share_of_floor"], wanted.value))
    for row in rows_of(sections, "waterfall", "cumulative"):
        gain = row.get("gain")
        if device is not None and gain is not None and gain < row["predicted_gain"]:
            found.append(Missed(f"waterfall: {row['name']}", "gain", gain, row["predicted_gain"]))
    return sorted(found, key=lambda one: one.measured / one.predicted)


def rows_of(sections: Mapping[str, Mapping[str, Any]], name: str, rows: str = "rows") -> list[dict[str, Any]]:
    """What a section measured; nothing where it did not."""
    found: list[dict[str, Any]] = sections.get(name, {}).get(rows, [])
    return found


def step_name(row: Mapping[str, Any]) -> str:
    """A row of the step in a few words."""
    weights = "NF4" if row["weights"] == "nf4" else "not packed"
    mode = "" if row["checkpointing"] == "none" else f", {row['checkpointing']}"
    return f"{row['shape']}, {weights}, {row['tokens']} tokens{mode}"


def document(report: Mapping[str, Any], texts: Mapping[str, Text], pictures: Sequence[str]) -> str:
    """All sections that were asked for, each with what it left out; first what is furthest from its limit.

    Args:
        report: as it is stored.
        texts: how each section is written.
        pictures: names of the files that were drawn.
    """
    sections = report["sections"]
    device = "a GPU" if report["device"] == "cuda" else "a CPU, at small sizes"
    states = [[name, _state(found), f"{found['seconds']:.1f}"] for name, found in sections.items()]
    lines = [
        "# Measured beside predicted",
        "",
        f"Made by `{report['command']}` on {device} in {report['minutes_taken']:.1f} minutes "
        f'(allowed: {report["minutes_allowed"]:g}). Every figure but those under "predicted" or "planned" was '
        "measured in this run.",
        "",
        *table(["section", "state", "seconds"], states),
        "",
        *_furthest(report),
    ]
    for name, found in sections.items():
        lines += ["", f"## {name.capitalize()}", ""]
        lines += texts[name](found) if found["status"] == "measured" else [_state(found)]
        if left_out := found.get("left_out"):
            lines += ["", "Left out:", "", *(f"- {reason}" for reason in left_out)]
        for picture in _AFTER.get(name, ()):
            if picture in pictures:
                lines += ["", f"![{picture.removesuffix('.png')}]({picture})"]
    return "\n".join(lines) + "\n"


def _state(found: Mapping[str, Any]) -> str:
    return "measured" if found["status"] == "measured" else f"{found['status']}: {found['reason']}"


def _furthest(report: Mapping[str, Any]) -> list[str]:
    lines = ["## What is furthest from its limit", ""]
    found = gaps(report["sections"])
    if found:
        rows = [[gap.name, percent(gap.share), gap.limit, plain(gap.lost_us)] for gap in found[:_SHOWN]]
        lines += table(["measurement", "reached", "of its", "us above it"], rows)
        if len(found) > _SHOWN:
            lines += ["", f"The first {_SHOWN} of {len(found)} measurements that have a limit."]
    else:
        lines.append("Nothing with a limit was measured.")
    lines += ["", "Furthest from its prediction:", ""]
    if report["device_class"] is None:
        return [*lines, "nothing was predicted for this device; the predictions below are for an H100."]
    below = missed(report)
    if not below:
        return [*lines, "no measurement is below its prediction."]
    rows = [[one.name, one.figure, plain(one.measured), plain(one.predicted)] for one in below[:_SHOWN]]
    return [*lines, *table(["measurement", "figure", "measured", "predicted"], rows)]
