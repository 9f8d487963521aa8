"""The lines of a run as the Markdown that README takes."""

from collections.abc import Mapping
from typing import Any

from reporting.tables import NONE, percent, plain, table, times

from gpu.lines import MACHINE, Line, latest

_HEAD = ["measured", "value", "share of its limit", "over the strongest other form", "predicted", "ran on"]
# bytes a second of the device that was predicted for, and of those that memory-bound predictions are scaled to
_BANDWIDTH = {"H100": 3.0, "H200": 4.3}


def tables(content: bytes, titles: Mapping[int, str]) -> str:
    """One table an item, from the content of results.jsonl, and beneath them on what and how they were measured."""
    found = latest(content)
    machine = found.pop((0, MACHINE), {})
    out: list[str] = []
    for number, title in titles.items():
        lines = [line for line in found.values() if line["item"] == number]
        if lines:
            rows = [_row(line, machine.get("device") or "") for line in lines]
            out += [f"### {number}. {title}", "", *table(_HEAD, rows), ""]
    return "\n".join([*out, *_beneath(machine)])


def _row(line: Line, device: str) -> list[str]:
    value = f"{plain(line['value'])} {line['unit']}".strip()
    if line["status"] != "ok":
        value = line["status"] + (f" ({value})" if line["value"] is not None else "")
    share = NONE if line["share_of_limit"] is None else f"{percent(line['share_of_limit'])} of {line['limit']}"
    speedup = NONE if line["speedup"] is None else f"{times(line['speedup'])} {line['baseline']}"
    return [line["name"], value, share, speedup, _prediction(line, device), line["backend"] or NONE]


def _prediction(line: Line, device: str) -> str:
    known = line["prediction"]
    if known is None:
        return NONE
    value, note = known["value"], known["device"]
    for name, bandwidth in _BANDWIDTH.items():
        if name in device and name != known["device"] and known["bound"] == "memory" and known["of"] == "value":
            faster = bandwidth / _BANDWIDTH[known["device"]]
            value = value * faster if line["unit"].endswith("/s") else value / faster
            note = f"{known['device']} scaled to {name}"
    shown = times(value) if known["of"] == "speedup" else f"{plain(value)} {line['unit']}".strip()
    return f"{shown} ({f'{note}; ' if note else ''}{known['source']})"


def _beneath(machine: Mapping[str, Any]) -> list[str]:
    if not machine:
        return ["No call of the run is recorded here."]
    names = (machine.get("device"), machine.get("memory"), machine.get("driver") and f"driver {machine['driver']}")
    where = ", ".join(filter(None, names)) or "no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    scaled = any(name in (machine.get("device") or "") for name in _BANDWIDTH)
    lines = [
        f"Measured by `{machine['command']}` on {where}, {machine['date']}, commit {machine['commit']}; the package "
        f"{machine['package']}. Python {machine['python']}, {versions}.",
        "",
        "Predictions were made before anything ran, for an H100 (3.0 TB/s, 798 TFLOP/s in bfloat16)"
        + ("" if scaled else "; this device is another one, so they are no claim about it")
        + ".",
    ]
    return ["**A rehearsal: no figure was kept.**", "", *lines] if machine.get("rehearsal") else lines
