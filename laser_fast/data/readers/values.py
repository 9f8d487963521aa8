"""One value of a row: an external id, a number or a text, or an error that names file, line, column and value."""

import math
from decimal import Decimal
from typing import Any

from laser_fast.data.readers.rows import Row, is_unicode
from laser_fast.data.readers.streams import MAX_ROW_BYTES
from laser_fast.data.time_units import number_in

_INT64_MAX = 2**63 - 1
_NULL_WORDS = frozenset(
    ("nan", "-nan", "none", "null", "(null)", "nil", "\\n", "<na>", "n/a", "#n/a", "nat", "undefined")
)
_NULL_OF_R = "NA"  # only in capitals: "na" is a name


def is_null_word(text: str) -> bool:
    """Whether exporters write `text` for a missing value (pandas, SQL, Hive, R, spreadsheets, JavaScript)."""
    return text.lower() in _NULL_WORDS or text == _NULL_OF_R


def parse_id(row: Row, column: str, value: Any) -> str:
    """An external id as a string: one line of text or a whole number, never a word for a missing value.

    Raises:
        ValueError: the value is none of these.
    """
    rule, remedy = "an id must be text or a whole number", ""
    if isinstance(value, str):
        text = value.strip()
        if "\n" in text or "\r" in text:  # most likely from a quote that stands open
            rule = "an id must be one line"
        elif text and is_null_word(text):
            rule = "an id must be no word that exporters write for a missing value"
            remedy = "leave such rows out (--skip-bad-rows), or rename the id if it is one"
        elif text and is_unicode(text):
            return text
    elif isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    elif isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    raise row.error(rule, column, value, remedy)


def parse_number(row: Row, column: str, value: Any) -> int | float:
    """A finite number; whole numbers stay exact.

    Raises:
        ValueError: not a number, not finite, or a whole number beyond int64.
    """
    number: int | float | None = None
    if isinstance(value, str) and "_" not in value:
        number = number_in(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = value
    elif isinstance(value, Decimal) and value.is_finite():
        number = int(value) if value == value.to_integral_value() else float(value)
    if isinstance(number, int):
        if -_INT64_MAX <= number <= _INT64_MAX:
            return number
        raise row.error("a whole number must fit into 64 bits", column, value)
    if number is None or not math.isfinite(number):
        raise row.error("the value must be a finite number", column, value)
    return number


def parse_text(row: Row, column: str, value: Any, joiner: str = ", ") -> str:
    """A text: strings as they are, None and NaN as "", numbers written out, lists joined by `joiner`.

    Raises:
        ValueError: the value is a JSON object, lists too deep inside each other, or a string that is not valid Unicode
            or longer than `MAX_ROW_BYTES`.
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
    elif isinstance(value, dict | bytes | tuple):  # a tuple is an entry of a map
        raise row.error("a text must be a string, a number or a list", column, value)
    else:
        text = f"{value:f}" if isinstance(value, Decimal) else str(value)
    if len(text) > MAX_ROW_BYTES:
        raise row.error(f"a text must have at most {MAX_ROW_BYTES:,} characters", column, text)
    if not is_unicode(text):
        raise row.error("a text must be valid Unicode", column, value)
    return text
