"""results.jsonl: one line of JSON for everything that was measured, written whole or not at all."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MACHINE = "machine"  # the line of a call itself, item 0

Line = dict[str, Any]


def line_of(item: int, name: str, status: str, **facts: Any) -> Line:
    """A line with every field that all of them have; those that are not given are null.

    Args:
        name: unique in the item.
        status: "ok", "rehearsed", or "failed: ...", "skipped: ...", "cut: ..." with the reason.
        facts: value and unit; limit (the roof, in words) and share_of_limit; baseline (the strongest) and speedup over
            it; backend; prediction (value, source, device); seconds; again = whether a later call measures it anew.
    """
    fields = ("value", "unit", "limit", "share_of_limit", "baseline", "speedup", "backend", "prediction", "seconds")
    return {"item": item, "name": name, "status": status} | dict.fromkeys(fields) | facts


class Lines:
    """The file, open for this call alone.

    What a killed call left of its last line is cut off when the file is opened.

    Raises:
        BlockingIOError: another call is writing it.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        os.truncate(self._file, len(whole))
        self._latest = latest(whole)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line; when this returns, it is on the disk."""
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        self._latest[line["item"], line["name"]] = dict(line)

    def known(self) -> list[Line]:
        """The newest line of everything, in the order in which they were first written."""
        return list(self._latest.values())

    def missing(self, item: int, names: Sequence[str], *, rehearse: bool) -> list[str]:
        """Those of the names that have no line yet, or one that is to be measured again."""
        found = {name: self._latest.get((item, name), {"again": True}) for name in names}
        return [n for n, line in found.items() if line.get("again") or bool(line.get("rehearsal")) != rehearse]


def latest(content: bytes) -> dict[tuple[int, str], Line]:
    """By item and name the last line; what is no whole line at the end is left out."""
    found: dict[tuple[int, str], Line] = {}
    for text in content[: content.rfind(b"\n") + 1].splitlines():
        line = json.loads(text)
        found[line["item"], line["name"]] = line
    return found
