"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reporting.limits import gaps, missed
from reporting.tables import percent, plain, table

Text = Callable[[Mapping[str, Any]], list[str]]

_SHOWN = 10
_AFTER = {"step": ("roofline.png", "memory.png"), "waterfall": ("waterfall.png",), "kernels": (), "cards": ()}


def document(report: Mapping[str, Any], texts: Mapping[str, Text], pictures: Sequence[str]) -> str:
    """All sections that were asked for, each with what it left out; first what is furthest from its limit.

    Args:
        report: as it is stored.
        texts: how each section is written.
        pictures: names of the files that were drawn.
    """
    sections = report["sections"]
    device = "a GPU" if report["device"] == "cuda" else "a CPU, at small sizes"
    lines = [
        "# Measured beside predicted",
        "",
        f"Made by `{report['command']}` on {device} in {report['minutes_taken']:.1f} minutes "
        f'(allowed: {report["minutes_allowed"]:g}). Every figure but those under "predicted" or "planned" was '
        "measured in this run.",
        "",
        *table(["section", "state", "seconds"], [_state(name, found) for name, found in sections.items()]),
        "",
        *_furthest(report),
    ]
    for name, found in sections.items():
        lines += ["", f"## {name.capitalize()}", ""]
        lines += _section(found, texts[name])
        for picture in _AFTER.get(name, ()):
            if picture in pictures:
                lines += ["", f"![{picture.removesuffix('.png')}]({picture})"]
    return "\n".join(lines) + "\n"


def _state(name: str, found: Mapping[str, Any]) -> list[str]:
    state = found["status"] if found["status"] == "measured" else f"{found['status']}: {found['reason']}"
    return [name, state, f"{found['seconds']:.1f}"]


def _section(found: Mapping[str, Any], text: Text) -> list[str]:
    if found["status"] != "measured":
        return [f"{found['status']}: {found['reason']}"]
    lines = text(found)
    left_out = found.get("left_out", [])
    return lines + (["", "Left out:", "", *(f"- {reason}" for reason in left_out)] if left_out else [])


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
