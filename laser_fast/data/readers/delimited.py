"""Rows of delimited text, with quotes as in RFC 4180 or without any.

Not with the `csv` module: its limit of a field is one for the whole process, and after an open quote it cannot go back.
"""

import re
from collections.abc import Iterator

from laser_fast.data.readers.bad_rows import BadRowError, BadRows
from laser_fast.data.readers.layouts import Layout
from laser_fast.data.readers.streams import MAX_ROW_BYTES, Lines

MAX_QUOTED_LINES = 10_000
"""Most lines of a quoted row: one that is longer is taken for a quote that somebody forgot to close."""
_LINE_END = re.compile(r"\r?\n?\Z")


class _MalformedError(ValueError):
    """What is wrong with the quotes of a row, without its place."""


def split_rows(lines: Lines, layout: Layout, bad_rows: BadRows) -> Iterator[tuple[int, int, list[str]]]:
    """Number of the first line, number of lines and values of every row, the header included.

    Of a row with quotes that is malformed only the first line is bad: a quote nobody closed costs one row, and the
    lines behind it are read as rows of their own.

    Raises:
        BadRowError: the header cannot be read; other rows only without `bad_rows.skip`.
    """
    quotes, delimiter, is_header = layout.kind == "csv", layout.delimiter, layout.columns is None
    while True:
        try:
            line = next(lines)
            first = lines.number
            if quotes and '"' in line:
                values = _quoted(line, lines, delimiter)
            else:
                line = line.rstrip("\r\n")
                if quotes and "\r" in line:
                    raise _malformed(lines.name, "a carriage return that ends no line", first)
                values = line.split(delimiter)
        except StopIteration:
            return
        except BadRowError as error:
            if is_header:
                raise
            bad_rows.add(error)
        else:
            yield first, lines.number - first + 1, values
        is_header = False


def _malformed(name: str, found: str, line: int) -> BadRowError:
    rule = f"{name}: the row must be well-formed"
    return BadRowError(f"{rule}, got {found} in line {line}", rule)


def _quoted(line: str, lines: Lines, delimiter: str) -> list[str]:
    """The values of a row whose first line holds a quote; a bad row leaves `lines` right behind this first line."""
    text = line.rstrip("\r\n")
    if text[0] == text[-1] == '"':
        values = text[1:-1].split(f'"{delimiter}"')
        if text.count('"') == 2 * len(values):  # every quote opens or closes: the usual row, and a fast one
            return values
    first = lines.number
    lines.mark()
    try:
        return _fields(line, _rest_of_row(line, lines), delimiter)
    except (_MalformedError, BadRowError) as error:  # also a further line that is no text
        lines.rewind()
        raise _malformed(lines.name, str(error), first) from error
    finally:
        lines.forget_mark()


def _rest_of_row(line: str, lines: Lines) -> Iterator[str]:
    """Further lines for an open quote, as many and as long as a row may have."""
    size = len(line)
    for _ in range(MAX_QUOTED_LINES - 1):
        try:
            further = next(lines)
        except StopIteration:
            raise _MalformedError(f"a quote that is open to the end of the file, line {lines.number},") from None
        size += len(further)
        if size > MAX_ROW_BYTES:
            raise _MalformedError(f"a quote that is open for more than {MAX_ROW_BYTES:,} characters")
        yield further
    raise _MalformedError(f"a quote that is open for more than {MAX_QUOTED_LINES:,} lines")


def _fields(text: str, further: Iterator[str], delimiter: str) -> list[str]:
    values: list[str] = []
    place = 0  # where the next value begins in `text`
    while True:
        if not text.startswith('"', place):
            end = text.find(delimiter, place)
            value = text[place:end] if end >= 0 else text[place:].rstrip("\r\n")
            if "\r" in value:
                raise _MalformedError("a carriage return that ends no line")
            values.append(value)
            if end < 0:
                return values
            place = end + 1
            continue
        value, text, place = _quoted_value(text, further, place + 1)
        values.append(value)
        if _LINE_END.match(text, place):
            return values
        if not text.startswith(delimiter, place):
            raise _MalformedError(f"{text[place]!r} behind a closing quote")
        place += 1


def _quoted_value(text: str, further: Iterator[str], place: int) -> tuple[str, str, int]:
    """A value from behind its opening quote, the line where it ends, and the place behind its closing quote there."""
    pieces: list[str] = []
    while True:
        end = text.find('"', place)
        if end < 0:
            pieces.append(text[place:])
            text, place = next(further), 0
        elif text.startswith('"', end + 1):  # two of them are one of the value
            pieces.append(text[place : end + 1])
            place = end + 2
        else:
            pieces.append(text[place:end])
            return "".join(pieces), text, end + 1
