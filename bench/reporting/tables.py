"""Tables of a report in Markdown, and how its numbers are written."""

from collections.abc import Sequence

GIB = 2**30
NONE = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is text, the others stand on the right."""
    rule = ["---", *(["---:"] * (len(head) - 1))]
    lines = [head, rule, *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]


def size(num_bytes: float | None) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    if num_bytes is None:
        return NONE
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.1f} MiB"


def percent(share: float | None) -> str:
    """A share of one."""
    return NONE if share is None else f"{share:.1%}"


def times(ratio: float | None) -> str:
    """How many times as fast."""
    return NONE if ratio is None else f"{ratio:.2f}x"


def plain(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where it is of everyday size."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
