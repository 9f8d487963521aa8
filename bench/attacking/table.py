"""The table of docs/reliability.md, from the file of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reporting.tables import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "cpu" / "attack.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- attack: begin -->", "<!-- attack: end -->"


def markdown(report: Mapping[str, Any]) -> str:
    """The table, and beneath it on what and how it was made."""
    rows = []
    for line in report["lines"]:
        ended = ", ".join(f"{count:,} {outcome}" for outcome, count in line["outcomes"].items())
        if line["not_run"]:
            rows.append([line["what"], "not run", line["not_run"], ""])
        else:
            rows.append([line["what"], f"{line['tried']:,}", ended, f"{line['lost']:,}"])
    found = report["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    beneath = (
        f"`{report['command']}`, {report['seconds'] / 60:.0f} min on {found['cores']} cores of {found['processor']}, "
        f"{found['date'][:10]}, commit {found['commit']}. Python {found['python']}, {versions}."
    )
    return "\n".join([*table(["what was tried", "how often", "how it ended", "lost"], rows), "", beneath])


def put_into_page(results: Path) -> None:
    """Replace the table of the page by that of a run.

    Raises:
        ValueError: the run was a rehearsal, whose figures say nothing.
    """
    report = json.loads(results.read_text(encoding="utf-8"))
    if report["rehearsal"]:
        raise ValueError(f"put_into_page: {results.name} must be of a real run, got a rehearsal")
    before, _, after = parts(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(report)}\n{END}{after}", encoding="utf-8")


def parts(page: str) -> tuple[str, str, str]:
    """What stands before, between and after the marks of a page.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"section: the page must have the marks {BEGIN} and {END}, got {len(page)} characters without")
    return before, inside, after
