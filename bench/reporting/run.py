"""Runs the sections one after the other, whatever happens in any of them, and writes the report."""

import argparse
import json
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from peak_memory import release

from reporting import baselines, cards, environment, kernels, step, training, waterfall
from reporting.context import Context, Deadline
from reporting.document import document
from reporting.pictures import draw
from reporting.reasons import Skip, without_paths
from reporting.settings import ON_CPU, ON_GPU, Settings

Found = dict[str, Any]


class Section(NamedTuple):
    """How a section measures, and how it is written."""

    measure: Callable[[Context, Deadline], Found]
    markdown: Callable[[Mapping[str, Any]], list[str]]


SECTIONS = {
    "environment": Section(environment.measure, environment.markdown),
    "roofs": Section(environment.measure_roofs, environment.roofs_markdown),
    "kernels": Section(kernels.measure, kernels.markdown),
    "step": Section(step.measure, step.markdown),
    "waterfall": Section(waterfall.measure, waterfall.markdown),
    "baselines": Section(baselines.measure, baselines.markdown),
    "cards": Section(cards.measure, cards.markdown),
    "training": Section(training.measure, training.markdown),
}


def main(words: Sequence[str] | None = None, settings: Settings | None = None) -> int:
    """Measure and write; 0, 1 where a section failed, 2 without a device. Without settings they are the device's."""
    arguments = _arguments(words)
    if not arguments.cpu and not torch.cuda.is_available():
        print("report: torch sees no CUDA device; give --cpu for a report of small sizes", file=sys.stderr)
        return 2
    settings = settings or (ON_CPU if arguments.cpu else ON_GPU)
    if arguments.minutes is not None:
        settings = replace(settings, minutes=arguments.minutes)
    chosen = [name for name in SECTIONS if not arguments.only or name in arguments.only]
    arguments.out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if words is None else [str(word) for word in words]
    device, start = torch.device("cpu") if arguments.cpu else torch.device("cuda", 0), perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        context = Context(device, settings, Path(folder))
        found = measure_all(context, chosen)
    report = {
        "command": without_paths(shlex.join(["python", "bench/report.py", *given])),
        "device": device.type,
        "device_class": context.device_class,
        "minutes_allowed": settings.minutes,
        "minutes_taken": round((perf_counter() - start) / 60, 2),
        "sections": found,
    }
    return write(report, arguments.out)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report.py",
        description="Measure the training step and everything under it, and write one report.",
        epilog="Exit status: 0, 1 where a section failed (the report says which and why), 2 for unusable arguments.",
    )
    parser.add_argument("out", type=Path, help="folder for report.json, report.md and the pictures")
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU, also where there is a GPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--minutes", type=_minutes, help="for everything (9 on a GPU, 3.75 on a CPU)")
    return parser.parse_args(words)


def _minutes(word: str) -> float:
    value = float(word)
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"minutes must be above 0 and below 1000, got {word}")
    return value


def measure_all(context: Context, chosen: Sequence[str]) -> dict[str, Found]:
    """What each section found; one that fails says so and stops no other.

    A section may take its share of the time and what those before it left over.
    """
    seconds = 60 * context.settings.minutes
    shares = context.settings.shares
    whole = sum(shares[name] for name in chosen)
    start, passed = perf_counter(), 0
    found = {}
    for name in chosen:
        passed += shares[name]
        deadline = Deadline(seconds * passed / whole - (perf_counter() - start))
        found[name] = _guarded(SECTIONS[name], context, deadline)
        print(f"report: {name}: {found[name]['status']}, {found[name]['seconds']:.1f} s", file=sys.stderr, flush=True)
        release()
    return found


def _guarded(section: Section, context: Context, deadline: Deadline) -> Found:
    start = perf_counter()
    try:
        found: Found = {"status": "measured", **section.measure(context, deadline)}
    except Skip as reason:
        found = {"status": "skipped", "reason": without_paths(str(reason))}
    except Exception as error:  # whatever it is, the other sections are to be measured
        traceback.print_exc()
        said = str(error).strip().splitlines() or ["no message"]
        found = {"status": "failed", "reason": without_paths(f"{type(error).__name__}: {said[0]}")}
    return found | {"seconds": round(perf_counter() - start, 2)}


def write(report: Mapping[str, Any], out: Path) -> int:
    """Write report.json, the pictures and report.md; the exit status."""
    texts = {name: section.markdown for name, section in SECTIONS.items()}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(document(report, texts, draw(report, out)), encoding="utf-8")
    status = 0
    for name, found in report["sections"].items():
        for reason in [found["reason"]] if found["status"] == "failed" else found.get("failures", []):
            print(f"report: {name} failed: {reason}", file=sys.stderr)
            status = 1
    return status
