"""One value of a row: an external id, a number or a text, or an error that names file, line, column and value."""

import math
from typing import Any

from laser_fast.data.readers.rows import Row, is_unicode

_INT64_MAX = 2**63 - 1


def parse_id(row: Row, column: str, value: Any) -> str:
    """An external id as a string: text or a whole number, not empty, not NaN.

    Raises:
        ValueError: the value is none of these.
    """
    if isinstance(value, str):
        text = value.strip()
        if text and text.lower() != "nan" and is_unicode(text):
            return text
    elif isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise row.error("an id must be text or a whole number", column, value)


def parse_number(row: Row, column: str, value: Any) -> int | float:
    """A finite number; whole numbers stay exact.

    Raises:
        ValueError: not a number, not finite, or a whole number beyond int64.
    """
    number: int | float | None = None
    if isinstance(value, str) and "_" not in value:
        number = _number_in(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = value
    if isinstance(number, int):
        if -_INT64_MAX <= number <= _INT64_MAX:
            return number
        raise row.error("a whole number must fit into 64 bits", column, value)
    if number is None or not math.isfinite(number):
        raise row.error("the value must be a finite number", column, value)
    return number


def _number_in(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def parse_text(row: Row, column: str, value: Any, joiner: str = ", ") -> str:
    """A text: strings as they are, None and NaN as "", numbers written out, lists joined by `joiner`.

    Raises:
        ValueError: the value is a JSON object, lists too deep inside each other, or a string that is not valid Unicode.
    """
    if isinstance(value, str):
        text = value
    elif value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    elif isinstance(value, list):
        try:
            return joiner.join(text for entry in value if (text := parse_text(row, column, entry, joiner)))
        except RecursionError as error:
            raise row.error("the lists of a text must not be that deep", column, "a list") from error
    elif isinstance(value, dict | bytes):
        raise row.error("a text must be a string, a number or a list", column, value)
    else:
        text = str(value)
    if not is_unicode(text):
        raise row.error("a text must be valid Unicode", column, value)
    return text
