"""The two forms of a report of data from anywhere: nothing in it is more than text."""

import unicodedata

from laser_fast.reports.document import (
    Block,
    Bullets,
    Document,
    Heading,
    Listing,
    Paragraph,
    Picture,
    Section,
    Table,
    to_html,
    to_markdown,
)

EVIL = "x\x1b[2J\x00\x9b \u202egnp.exe\u2028\ud800 <img src=x> ](http://y) | `a` -->\r"


BLOCKS = (
    Paragraph(EVIL, "note"),
    Heading(EVIL),
    Bullets((EVIL,)),
    Table((EVIL,), ((EVIL,),), caption=EVIL),
    Picture("a", b"<svg/>", EVIL, EVIL),
    Listing(f"```\n\t{EVIL}"),
)


def pages(title: str, *blocks: Block) -> tuple[str, str]:
    document = Document(title, title, (Section(title, blocks),))
    return to_html(document), to_markdown(document)


def test_no_page_holds_a_control_character_or_a_tag_of_the_data() -> None:
    for page in pages(EVIL, *BLOCKS):
        page.encode("utf-8")
        kinds = {unicodedata.category(character) for character in page if character not in "\n\t"}
        assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert "\\x1b[2J" in page.replace("\\\\", "\\").replace("\\[", "[")
        assert "<img src=x>" not in page.split("```")[0]
    markdown = pages(EVIL, *BLOCKS)[1]
    assert markdown.rstrip().endswith("\n````") and markdown.count("````") == 2  # a listing cannot end its block


def test_both_forms_of_a_document() -> None:
    table = Table(("a", "b"), (("b|c", "1"), ("", "2")), "of both", strong=frozenset({0}))
    picture = Picture("plot", b"<svg/>", "what", "why")
    html, markdown = pages("t", Paragraph("x", "lead"), picture, picture, table, Listing("```\nrm"))
    assert html.count('<div class="pictures">') == 1 and html.count("base64,PHN2Zy8+") == 2
    assert '<tr class="strong"><td class="wide">b|c</td><td>1</td></tr>\n<tr><td class="wide"></td><td>2</td>' in html
    assert "<pre>```\nrm</pre>" in html and '<p class="lead">x</p>' in html
    assert "> **x**\n\n![what](plot.svg)\n\nwhy\n\n" in markdown
    assert "\n\n| a | b |\n|---|--:|\n| **b\\|c** | **1** |\n|  | 2 |\n\nof both\n" in markdown
    assert "````\n```\nrm\n````" in markdown
