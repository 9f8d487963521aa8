"""Item texts: cleaning what the sources hold, and rendering an item's fields into one text."""

import html
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

from laser_fast.data.items import ItemTable

# a bare "&" is text: "R&B", "AT&T"; so is what is longer than any entity, as `html.unescape` takes the square of its
# length, and refuses numbers of some thousand digits
_ENTITY = re.compile(r"&(?:#\d{1,32}|#[xX][0-9a-fA-F]{1,32}|[A-Za-z][A-Za-z0-9]{0,31});")
_HIDDEN = re.compile(r"<!--|<((?a:script|style))\b", re.IGNORECASE)  # where what is not shown begins
_COMMENT_END = re.compile("-->")
_END = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in ("script", "style")}
# known names only: "x < y > z" and "<3" are text
_TAG = re.compile(
    r"</?(?:a|abbr|b|big|blockquote|br|center|div|em|font|h[1-6]|hr|i|img|li|ol|p|pre|small|span|strong|sub|sup|table"
    r"|tbody|td|th|thead|tr|tt|u|ul)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_MISSING = frozenset({"nan", "NaN"})  # what data frames write for no value


def clean_text(text: str) -> str:
    """`text` without HTML tags, comments and entities, white space collapsed; "nan" and "NaN" become "".

    Example: `clean_text("Nuts &amp;<br>bolts ") == "Nuts & bolts"`.
    """
    if "<" in text:
        text = _TAG.sub(" ", _without_hidden(text))
    if "&" in text:
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    text = " ".join(text.split())
    return "" if text in _MISSING else text


def _without_hidden(text: str) -> str:
    """`text` with a space for every comment, script and style sheet; one that does not end is text.

    Takes a time that grows with the text: whatever ends nowhere behind a place is not looked for behind a later one.
    """
    pieces, position, start = [], 0, 0
    endless: set[str] = set()
    while (opening := _HIDDEN.search(text, start)) is not None:
        start, name = opening.end(), (opening[1] or "").lower()
        end = None if name in endless else _hidden_end(text, opening, name)
        if end is None:
            endless.add(name)
            continue
        pieces.append(text[position : opening.start()])
        position = start = end
    return " ".join([*pieces, text[position:]])


def _hidden_end(text: str, opening: re.Match[str], name: str) -> int | None:
    """Where the comment ("") or the element `name` ends that `opening` begins; None if it does not."""
    start = opening.end()
    if name:
        start = text.find(">", start) + 1
    found = (_END[name] if name else _COMMENT_END).search(text, start) if start else None
    return None if found is None else found.end()


def first_words(text: str, longest: int) -> str:
    """The first `longest` words of `text`; shorter texts stay as they are, white space included."""
    words = text.split(maxsplit=longest)
    return text if len(words) <= longest else " ".join(words[:longest])


_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _bracket_start(literal: str) -> int:
    """Where the first bracket opens in `literal` that does not close in it; its length if there is none."""
    open_at: list[int] = []
    for position, character in enumerate(literal):
        if character in _CLOSING:
            open_at.append(position)
        elif open_at and character == _CLOSING[literal[open_at[-1]]]:
            open_at.pop()
    return open_at[0] if open_at else len(literal)


def _join(parts: list[tuple[str, str | None]], values: Mapping[str, str]) -> str:
    """The template filled in; see `ItemText` for what an empty field takes along."""
    pieces: list[str] = []
    opening, carried = "", ""  # carried: text that opened a bracket before an empty field
    filled = False
    for position, (literal, name) in enumerate(parts):
        if carried and literal.startswith(_CLOSING[carried[_bracket_start(carried)]]):
            literal, carried = literal[1:], ""
        start = _bracket_start(literal)
        if name is None:
            pieces.append(literal)
        elif values[name]:
            before = carried or literal
            if not filled and position > 0:
                before = opening + before[_bracket_start(before) :]
            pieces += [before, values[name]]
            filled, carried = True, ""
        else:
            if position == 0:
                opening = literal[:start]
            if not carried and start < len(literal):
                carried = literal
    return "".join(pieces) if filled else ""


@dataclass(frozen=True)
class ItemText:
    """Text of an item from a template over its fields, e.g. `ItemText("{title} by {brand}")`.

    An empty field leaves no trace: it takes along the words that join it to the field before, and the bracket around
    it; an item whose fields are all empty has the text "".

    Args:
        template: literal text and `{field}` names; `{{` and `}}` stand for braces.
        max_words: longest text in words, the rest is cut off; None keeps all.

    Raises:
        ValueError: the template names no field or is malformed, or `max_words` is smaller than 1.
    """

    template: str = "{title}"
    max_words: int | None = None

    def __post_init__(self) -> None:
        if self.max_words is not None and self.max_words < 1:
            raise ValueError(f"ItemText: max_words must be at least 1, got {self.max_words}")
        if not self.fields:
            raise ValueError(f"ItemText: the template must name a field in braces, got {self.template!r}")

    def _parts(self) -> list[tuple[str, str | None]]:
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"ItemText: the template must have paired braces, got {self.template!r}") from error
        for _, name, spec, conversion in parsed:
            if name is not None and (not name or spec or conversion):
                raise ValueError(f"ItemText: a field must be a plain name in braces, got {self.template!r}")
        return [(literal, name) for literal, name, _, _ in parsed]

    @property
    def fields(self) -> list[str]:
        """Names of the fields, in the order of the template."""
        return [name for _, name in self._parts() if name is not None]

    def render(self, items: ItemTable) -> list[str]:
        """The text of every item.

        Raises:
            ValueError: the template names a field the items do not have; the message lists those they have.
        """
        for name in self.fields:
            if name not in items.fields:
                available = ", ".join(sorted(items.fields)) or "none"
                raise ValueError(f"ItemText.render: unknown field, got {name!r}; available: {available}")
        columns = {name: items.fields[name] for name in self.fields}
        parts = self._parts()
        texts = []
        for index in range(len(items)):
            words = _join(parts, {name: column[index].strip() for name, column in columns.items()}).split()
            texts.append(" ".join(words[: self.max_words]))
        return texts
