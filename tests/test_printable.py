"""Text of data as people see it: nothing that a terminal obeys, nothing that is no text, joiners kept."""

import pytest

from laser_fast.printable import escape_markdown, one_line, printable, shorten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Amélie, 東京, Ω", "Amélie, 東京, Ω"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\x9b31m", r"\x9b31m"),  # the C1 form of ESC [
        ("a\nb\r\tc\x00", r"a\nb\r\tc\x00"),
        ("abc\u202efdp.exe", r"abc\u202efdp.exe"),
        ("\u2066x\u2069", r"\u2066x\u2069"),
        ("a\u2028b\u2029\x85", r"a\u2028b\u2029\x85"),
        ("\ud83d \ufeff\uffff", r"\ud83d \ufeff\uffff"),
        ("👩\u200d🚀 क्\u200dष नि\u200cत", "👩\u200d🚀 क्\u200dष नि\u200cत"),  # joiners make one picture, and shape words
        ("שלום\u200f!", "שלום\u200f!"),  # marks turn nothing round
        ("", ""),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_may_stay() -> None:
    assert printable("a\n\tb\r\x1b", lines=True) == "a\n\tb\\r\\x1b"


def test_shorten_keeps_both_ends_and_says_what_is_gone() -> None:
    text = "start" + "x" * 10_000 + "end"
    short = shorten(text, 100)
    assert len(short) == 100
    assert short.startswith("start") and short.endswith("end") and "9,908 characters and more" in short
    assert shorten("x" * 100, 100) == "x" * 100


def test_a_message_is_one_line_of_bounded_length() -> None:
    assert one_line("a: b\n   got \x1b\n\nc ") == "a: b got \\x1b c"
    for hostile in ("\x1b" * 10**6, "\n " * 10**6, " " * 10**6 + "\nx", "x" * 10**6):
        shown = one_line(hostile)
        assert len(shown) <= 2000 and "\n" not in shown and "\x1b" not in shown


def test_markdown_is_text() -> None:
    shown = escape_markdown("[x](http://y) <b>`|*_ \x1b\n# z")
    assert shown == "\\[x\\](http://y) &lt;b&gt;\\`\\|\\*\\_ \\\\x1b \\# z"
