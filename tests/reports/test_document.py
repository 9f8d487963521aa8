"""A report of data from anywhere: nothing in it is more than text, and every picture is XML."""

import json
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from laser_fast.reports import read_run
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
from laser_fast.reports.plots import Line, curves, dots, over_epochs, paired_bars, ratios

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


def test_every_picture_is_xml() -> None:
    pytest.importorskip("matplotlib")
    names, values = [EVIL, "plain"], np.array([[1.0, 2.0], [0.5, 1.5]])
    pictures = [
        curves([Line(EVIL, [1, 2], [1.0, 2.0])], "steps", "loss"),
        over_epochs(names, [(EVIL, [1.0, 2.0])], "share", level=(1.5, EVIL)),
        paired_bars(names, [("one", [0.1, 0.2])], "share", (0.5, "balanced")),
        dots(names, [("one", [0.1, 0.2], [0.01, 0.02])], "metric"),
        ratios(names, ["1", "2"], values, values > 1, "expert"),
    ]
    for picture in pictures:
        assert ElementTree.fromstring(picture.decode("utf-8")).tag.endswith("svg")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "[" * 10**5 + "\n", "metrics.jsonl must hold a JSON object a line, got maximum recursion"),
        ("metrics.jsonl", "3\n", "metrics.jsonl must hold a stage, .* got line 1 without"),
        ("metrics.jsonl", '{"stage": "text", "epoch": 0}\n{"epoch": 1}\n', "must hold a stage, .* got line 2 without"),
        ("metrics.jsonl", '{"stage": "text", "epoch": "x"}\n', "number of an epoch if any, .* got line 1 without"),
        ("finished.json", "[]", r"finished.json: Input should be an object, got \[\]"),
        ("environment.json", "{", "environment.json: Invalid JSON: EOF"),
        ("config.yaml", "lm: &a [*a]", "got one: alias 'a' must not stand in what it names at line 1, column 9"),
    ],
)
def test_a_damaged_run_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lm: {}\ntraining: {}\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_a_line_of_the_log_may_hold_any_character(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lm: {}\ntraining: {}\n")
    line = {"stage": "text", "epoch": 0, "note": "a\u2028b\x85c"}
    text = json.dumps(line, ensure_ascii=False) + '\n{"stage": "te'  # the second was being written
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert [epoch.values["note"] for epoch in read_run(tmp_path).epochs] == ["a\u2028b\x85c"]
