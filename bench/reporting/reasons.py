"""Why something has no figure, in words that can be published. Nothing here imports torch."""

import re
from importlib.util import find_spec


class Skip(Exception):
    """There is nothing to measure here; the message says why."""


def package_missing(name: str) -> bool:
    """Whether a top-level package is not installed; it is looked up, not imported."""
    return find_spec(name) is None


def without_paths(text: str) -> str:
    """The text with the last part alone of every absolute path: a report is published."""
    return re.sub(r"(?<![\w.~/])/(?:[^\s/'\":]+/)+", "", text)
