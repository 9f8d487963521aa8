"""A report as blocks of plain text, pictures and tables; `html_page` and `markdown_page` write it, all escaped."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Paragraph:
    """Running text; a "lead" is the sentence to read first, a "note" says what is missing or how to read it."""

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
    """Cells as text; every row as long as the header.

    Attributes:
        wide: columns of words, aligned to the left; the others are aligned to the right.
        strong: rows to emphasise.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    wide: frozenset[int] = frozenset({0})
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A plot.

    Attributes:
        name: of its file, without suffix.
        svg: the file.
        alt: what it shows, for who cannot see it.
        caption: what to see in it.
    """

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
    """The whole report.

    Attributes:
        date: when it was written; all that differs between two reports of one run.
    """

    title: str
    date: str
    sections: tuple[Section, ...]

    def pictures(self) -> list[Picture]:
        """All pictures, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]
