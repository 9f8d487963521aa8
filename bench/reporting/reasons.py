"""Why something has no figure, in words that can be published."""

from __future__ import annotations

import re


class Skip(Exception):
    """Raised by what has nothing to measure here; the message says why."""


def without_paths(text: str) -> str:
    """The text with the last part alone of every absolute path: a report is published."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+", "", text)
