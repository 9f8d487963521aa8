"""A document as Markdown (tables as GitHub reads them), with its pictures as files beside it."""

import re

from laser_fast.printable import escape_markdown, printable
from laser_fast.reports.document import Block, Bullets, Document, Heading, Listing, Paragraph, Picture, Table


def to_markdown(document: Document) -> str:
    """The whole file; pictures are named `NAME.svg`."""
    parts = [f"# {escape_markdown(document.title)}", f"Report written {escape_markdown(document.date)}"]
    for number, section in enumerate(document.sections, start=1):
        parts.append(f"## {number}. {escape_markdown(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        text = escape_markdown(block.text)
        return {"plain": text, "lead": f"> **{text}**", "note": f"_{text}_"}[block.kind]
    if isinstance(block, Heading):
        return f"### {escape_markdown(block.text)}"
    if isinstance(block, Bullets):
        return "\n".join(f"- {escape_markdown(line)}" for line in block.lines)
    if isinstance(block, Listing):
        longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, longest + 1)  # longer than any within
        return f"{fence}\n{printable(block.text, lines=True).rstrip()}\n{fence}"
    if isinstance(block, Picture):
        return f"![{escape_markdown(block.alt)}]({block.name}.svg)\n\n{escape_markdown(block.caption)}"
    return _table(block)


def _table(table: Table) -> str:
    def line(cells: tuple[str, ...], strong: bool = False) -> str:
        written = [escape_markdown(cell) for cell in cells]
        return "| " + " | ".join(f"**{cell}**" if strong and cell else cell for cell in written) + " |"

    rule = "|" + "|".join("---" if column in table.wide else "--:" for column in range(len(table.header))) + "|"
    lines = [line(table.header), rule, *(line(row, number in table.strong) for number, row in enumerate(table.rows))]
    caption = f"\n\n{escape_markdown(table.caption)}" if table.caption else ""
    return "\n".join(lines) + caption
