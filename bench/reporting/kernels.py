"""Section "kernels": the benchmarks of single operations, in a process of their own, beside what was predicted."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roofline import Roofs

from reporting.context import BENCH, Context, Deadline
from reporting.predictions import on_any_device, predictions_for
from reporting.reasons import Skip, package_missing
from reporting.tables import NONE, percent, plain, table, times

_OPERATIONS = ("routing", "dispatch", "mformer", "attention", "prefix_kv", "catalog")
_GRACE_S = 20  # to write what is there after the time is over
_OVER = "an interruption, because the time was over"
_SPEEDUP = "speedup_over_"


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """Run the chosen benchmarks until the time is over and read what they recorded."""
    if package_missing("pytest_benchmark"):
        raise Skip("pytest-benchmark is not installed")
    stored = context.folder / "kernels.json"
    finished, failures = _run(context, stored, deadline)
    if not stored.exists() and finished == _OVER:
        raise Skip("the time was over before any benchmark had ended")
    if not stored.exists():
        raise RuntimeError(f"kernels: the benchmarks must record their figures, got none after {finished}")
    entries = json.loads(stored.read_text(encoding="utf-8"))["benchmarks"]
    rows = [row_of(entry, context.roofs) for entry in entries]
    return {"rows": rows, "chosen": context.settings.kernels, "ended": finished, "failures": failures}


def _run(context: Context, stored: Path, deadline: Deadline) -> tuple[str, list[str]]:
    """How it ended, and a line for every benchmark that failed: its forms do not agree, say."""
    files = [str(BENCH / f"bench_{name}.py") for name in _OPERATIONS]
    options = ["--benchmark-only", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "--rootdir"]
    command = [sys.executable, "-m", "pytest", *options, str(BENCH.parent), *files]
    command += ["-k", context.settings.kernels, f"--benchmark-json={stored}"]
    with (context.folder / "kernels.txt").open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, cwd=BENCH.parent, stdout=said, stderr=subprocess.STDOUT)
        try:
            status = process.wait(timeout=max(1.0, deadline.left_s))
            ended = "all of them" if status in (0, 1) else f"status {status}"
        except subprocess.TimeoutExpired:
            ended = _OVER
            _interrupt(process)
        said.seek(0)
        failures = [line for line in said.read().splitlines() if line.startswith("FAILED ")]
    return ended, failures


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would: pytest then writes what it has."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def row_of(entry: Mapping[str, Any], roofs: Roofs) -> dict[str, Any]:
    """What a report shows of a benchmark, from its `fullname` and `extra_info`."""
    info, benchmark = entry["extra_info"], entry["fullname"]
    name, shape = benchmark.rpartition("::")[2].removeprefix("test_"), info["shape"]
    row = {"name": name, "shape": shape}
    if "median_us" in info:
        row["us"] = info["median_us"]["candidate"]
        own = Roofs(info["copy_gb_per_s"], roofs.matmul_tflops)  # of the same minute
        operations = info.get("floating_point_operations", _operations(name, shape))
        dtype = str(shape["dtype"]).removeprefix("torch.")
        limit_s = own.seconds(info["moved_bytes"], operations, dtype)
        row["share_of_limit"] = limit_s / (row["us"] / 1e6)
        row["limit"] = "copy" if operations == 0 or own.seconds(0, operations, dtype) < limit_s else "products"
    else:
        row["us"] = 1e3 * info["median_ms"]["candidate"]
    measured = {key: value for key, value in info.items() if key.startswith(_SPEEDUP)}
    row["speedups"] = {key.removeprefix(_SPEEDUP): value for key, value in measured.items()}
    measured["share_of_limit"] = row.get("share_of_limit")
    row["predicted"] = [
        known._asdict() | {"measured": measured[known.figure]}
        for known in predictions_for(benchmark)
        if measured.get(known.figure) is not None
    ]
    elsewhere = [] if row["predicted"] else [on_any_device(benchmark, figure) for figure in measured]
    row["predicted_elsewhere"] = [known._asdict() for known in elsewhere if known is not None]
    return row


def _operations(name: str, shape: Mapping[str, Any]) -> int:
    """Of benchmarks that do not record them: every score of a top-k is a product over the width."""
    return 2 * shape["users"] * shape["items"] * shape["width"] if name.startswith("catalog_topk") else 0


def markdown(found: Mapping[str, Any]) -> list[str]:
    """One line a benchmark."""
    rows = []
    for row in found["rows"]:
        speedups = ", ".join(f"{times(value)} {name}" for name, value in row["speedups"].items())
        share = row.get("share_of_limit")
        limit = NONE if share is None else f"{percent(share)} ({row['limit']})"
        predicted = ", ".join(map(_figure, row["predicted"] or row["predicted_elsewhere"]))
        rows.append([row["name"], plain(row["us"]), limit, speedups, predicted or NONE])
    return [
        f"Benchmarks `{found['chosen']}` of `pytest bench`; the run ended after {found['ended']}. Speed-ups are over "
        "other forms in the same run. The limit is the time at the measured roofs; what fits into a cache may be "
        "faster.",
        "Predicted is for large and small cases on an H100; on another device it is shown for the same operation and "
        "is no claim about this one.",
        *(f"**{line}**" for line in found["failures"]),
        "",
        *table(["benchmark", "us", "share of its limit", "speed-up over", "predicted (H100)"], rows),
    ]


def _figure(known: Mapping[str, Any]) -> str:
    value = f"{known['value']:.3g}x" if known["unit"] == "x" else f"{known['value']:.0%} of the limit"
    return f">= {value} {known['figure'].removeprefix(_SPEEDUP)}".replace(" share_of_limit", "")
