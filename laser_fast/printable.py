"""Text of data where people read it: what a terminal obeys is escaped, Markdown is text, and the very long is cut.

Titles and ids come from anywhere. Written as they are they can move a terminal's cursor, forge lines of a log, turn the
order of letters round, or be no text that a file in UTF-8 or XML can hold.
"""

import re

LONGEST_MESSAGE = 2000
"""Characters of an error or a warning."""

# C0, DEL and C1; separators of lines; bidirectional embeddings, overrides and isolates (Unicode TR 36; Boucher and
# Anderson 2021, arXiv:2111.00169); marks of no text; halves of surrogate pairs. Joiners stay: words and emoji need them
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]"
)
_LINES = "\n\t"
_SPECIAL = re.compile(r"([\\`*_\[\]|~#$])")  # $: GitHub reads formulas


def printable(text: str, *, lines: bool = False) -> str:
    r"""`text` with control characters as Python writes them: ESC is `\x1b`, a new line `\n`.

    Args:
        lines: new lines and tabs stay, for text of several lines.
    """

    def escaped(found: re.Match[str]) -> str:
        return found[0] if lines and found[0] in _LINES else ascii(found[0])[1:-1]

    return _UNPRINTABLE.sub(escaped, text)


def shorten(text: str, longest: int) -> str:
    """`text` of at most `longest` characters, at least 60; a mark in its midst says how many are left out.

    The end stays, as errors say there what to do.
    """
    if len(text) <= longest:
        return text
    mark = f" [... {len(text) - longest:,} characters and more ...] "
    end = (longest - len(mark)) // 4
    return text[: longest - len(mark) - end] + mark + text[len(text) - end :]


def one_line(message: str, longest: int = LONGEST_MESSAGE) -> str:
    """`message` on one printable line of at most `longest` characters; its lines are joined by spaces."""
    # cut before it is worked on, and again because escapes are longer than what they stand for
    joined = " ".join(filter(None, (line.strip() for line in shorten(message, longest).split("\n"))))
    return shorten(printable(joined), longest)


def escape_markdown(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would read as more than text."""
    line = printable(" ".join(text.split()))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)
