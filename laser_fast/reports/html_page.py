"""A document as one HTML file: style and pictures inside, no script, nothing fetched; fit for a phone and for paper."""

import base64
import html
from itertools import groupby

from laser_fast.printable import printable
from laser_fast.reports.document import Block, Bullets, Document, Heading, Listing, Paragraph, Picture, Section, Table

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1.1rem 4rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .6rem 0 .2rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 2px solid #d9dee3; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul { margin: .6rem 0; max-width: 46rem; }
ul { padding-left: 1.3rem; }
li { margin: .35rem 0; }
.date { color: #555; margin: 0 0 1rem; }
nav { margin: .8rem 0; }
nav a { display: inline-block; margin: 0 1rem .3rem 0; color: #005a8c; }
.lead { font-size: 1.08rem; padding: .7rem .9rem; background: #eef4f9; border-left: 4px solid #0072b2; }
.note { color: #4a4a4a; font-size: .93rem; }
.pictures { display: grid; gap: 1rem 1.5rem; }
@media screen and (min-width: 48rem) { .pictures { grid-template-columns: 1fr 1fr; } }
figure { margin: .6rem 0; max-width: 34rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption, caption { color: #4a4a4a; font-size: .9rem; text-align: left; }
figcaption { margin-top: .2rem; }
caption { caption-side: bottom; padding-top: .4rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .75rem .32rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #e3e7ea; }
th { font-weight: 600; border-bottom: 1.5px solid #8a949c; }
.wide { text-align: left; }
td:not(.wide) { white-space: nowrap; }
tr.strong td { font-weight: 650; background: #eef4f9; }
pre { background: #f5f6f7; padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
@media print {
  @page { margin: 16mm 14mm; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  .pictures { grid-template-columns: 1fr 1fr; gap: 3mm 6mm; }
  table { font-size: 8.5pt; }
  nav { display: none; }
  figure, tr, .lead { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
}
"""


def to_html(document: Document) -> str:
    """The whole page."""
    links = "".join(f'<a href="#s{n}">{n}. {_text(s.title)}</a> ' for n, s in enumerate(document.sections, start=1))
    body = "\n".join(_section(number, section) for number, section in enumerate(document.sections, start=1))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(document.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{_text(document.title)}</h1>\n<p class="date">Report written {_text(document.date)}</p>\n'
        f"<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def _text(text: str, *, lines: bool = False) -> str:
    """`text` as HTML that shows it, in an attribute too; control characters, of which HTML has none, as escapes."""
    return html.escape(printable(text, lines=lines))


def _section(number: int, section: Section) -> str:
    parts = []
    for is_picture, blocks in groupby(section.blocks, lambda block: isinstance(block, Picture)):
        written = "\n".join(_block(block) for block in blocks)
        parts.append(f'<div class="pictures">\n{written}\n</div>' if is_picture else written)
    content = "\n".join(parts)
    return f'<section>\n<h2 id="s{number}">{number}. {_text(section.title)}</h2>\n{content}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        kind = "" if block.kind == "plain" else f' class="{block.kind}"'
        return f"<p{kind}>{_text(block.text)}</p>"
    if isinstance(block, Heading):
        return f"<h3>{_text(block.text)}</h3>"
    if isinstance(block, Bullets):
        return "<ul>\n" + "\n".join(f"<li>{_text(line)}</li>" for line in block.lines) + "\n</ul>"
    if isinstance(block, Listing):
        return f"<pre>{_text(block.text, lines=True)}</pre>"
    if isinstance(block, Picture):
        image = base64.b64encode(block.svg).decode("ascii")
        return (
            f'<figure><img alt="{_text(block.alt)}" src="data:image/svg+xml;base64,{image}">'
            f"<figcaption>{_text(block.caption)}</figcaption></figure>"
        )
    return _table(block)


def _table(table: Table) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        classes = [' class="wide"' if column in table.wide else "" for column in range(len(cells))]
        return "".join(f"<{tag}{name}>{_text(cell)}</{tag}>" for name, cell in zip(classes, cells, strict=True))

    lines = []
    for number, cells in enumerate(table.rows):
        strong = ' class="strong"' if number in table.strong else ""
        lines.append(f"<tr{strong}>{row(cells, 'td')}</tr>")
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    head = f"<thead><tr>{row(table.header, 'th')}</tr></thead>"
    body = "\n".join(lines)
    return f'<div class="scroll"><table>{caption}{head}<tbody>\n{body}\n</tbody></table></div>'
