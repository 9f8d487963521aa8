"""A report as blocks of plain text, tables and pictures, and as the page that Jinja2 makes of them.

Text may come from anywhere. `_page` escapes every value that a template shows.
"""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from laser_fast.printable import escape_markdown, printable


@dataclass(frozen=True)
class Paragraph:
    """Running text; a "lead" is to be read first, a "note" says what is missing or how to read the rest."""

    text: str
    kind: Literal["plain", "lead", "note"] = "plain"


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Cells as text; `wide` columns hold words and are aligned to the left, `strong` rows are emphasised."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    wide: frozenset[int] = frozenset({0})
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A plot: its file's name without suffix, the file, what it shows to who cannot see it, and what to see in it."""

    name: str
    svg: bytes
    alt: str
    caption: str


@dataclass(frozen=True)
class Listing:
    """Text whose lines and spaces matter."""

    text: str


Block = Paragraph | Heading | Bullets | Table | Picture | Listing


@dataclass(frozen=True)
class Section:
    """A numbered part of the report."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    date: str
    sections: tuple[Section, ...]

    def pictures(self) -> list[Picture]:
        """All pictures, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]


def to_html(document: Document) -> str:
    """One file with style and pictures inside, and without scripts or anything to fetch."""
    from markupsafe import escape

    return _page("page.html.jinja", document, lambda text: escape(printable(text)), escape)


def to_markdown(document: Document) -> str:
    """Markdown with GitHub's tables; pictures are the files `NAME.svg` beside it."""
    return _page("page.md.jinja", document, escape_markdown, str.rstrip)


def _page(template: str, document: Document, escaped: Callable[[str], str], listed: Callable[[str], str]) -> str:
    """The template filled in: `escaped` makes text safe, `listed` the printable text of a listing."""
    import jinja2
    from markupsafe import Markup

    def fence(text: str) -> Markup:  # longer than any run of backticks within
        return Markup("`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0)))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escaped(str(value))),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    environment.filters["fence"] = fence
    environment.filters["lines"] = lambda text: Markup(listed(printable(text, lines=True)))
    for kind in get_args(Block):
        environment.tests[kind.__name__.lower()] = lambda block, kind=kind: isinstance(block, kind)
    return environment.get_template(template).render(document=document)
