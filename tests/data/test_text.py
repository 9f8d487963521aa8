"""Cleaning of texts, and item texts from templates."""

import time

import pytest

from laser_fast.data import ItemTable, ItemText, clean_text, normalize_title


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Nuts &amp; bolts", "Nuts & bolts"),
        ("5&quot; x 3&#39; &#x2014; steel", "5\" x 3' \u2014 steel"),
        ("R&B, AT&T and black&notes", "R&B, AT&T and black&notes"),
        ("<b>Bold</b><br/>line<p class='x'>par</p>", "Bold line par"),
        ("a<!-- hidden -->b<style>p {}</style>c<script>x<y</script>d", "a b c d"),
        ("x < y > z, 3 <4, I <3 U", "x < y > z, 3 <4, I <3 U"),
        ("  two\n\tlines\u00a0here ", "two lines here"),
        ("nan", ""),
        ("NaN", ""),
        ("Nan Goldin", "Nan Goldin"),
        ("", ""),
    ],
)
def test_clean_text(text: str, expected: str) -> None:
    assert clean_text(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a<!-- b", "a<!-- b"),  # a comment that does not end is text
        ("a<!-- b <script>c</script>d", "a<!-- b d"),
        ("a<script c</script>d", "a<script c</script>d"),  # the first > ends the tag, so nothing ends the script
        ("a<script>b</style>c<STYLE x='1'>d</style >e", "a<script>b</style>c e"),
        ("a<scripts>b</scripts>", "a<scripts>b</scripts>"),
        ("a<!--<!-- b --> c -->d", "a c -->d"),
        ("a<style><!--</style>b-->c", "a b-->c"),
        ("<\u017ftyle>a</style>", "<\u017ftyle>a</style>"),  # not an s, though case folding says so
        ("&#" + "9" * 5000 + ";", "&#" + "9" * 5000 + ";"),  # no number of Unicode, and one int() refuses
        ("&amp" + "x" * 40 + ";", "&amp" + "x" * 40 + ";"),  # longer than any name
        ("&#x0000000041;&#0000000066;", "AB"),
        ("&CounterClockwiseContourIntegral;", "\u2233"),  # the longest name
    ],
)
def test_clean_text_at_its_edges(text: str, expected: str) -> None:
    assert clean_text(text) == expected


_SIZE = 100_000


@pytest.mark.parametrize(
    "part",
    [
        "<!--", "<script>", "<script ", "<script><style><!--", "<script></script ", "<!-- --", "<b ", "<b /", "<",
        "&", "&a", "&amp", "&#9", "&amp;", "&#x", " ", "\n<br", "(", "()", ", The", ", ", " (1999)", "(a, The)", "a,",
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", ["", ";)"])
def test_cleaning_takes_a_time_that_grows_with_the_text(part: str, end: str) -> None:
    text = part * (_SIZE // len(part)) + end
    begin = time.process_time()
    normalize_title(text, "1999")
    clean_text(text)
    clean_text(f"&{text.replace('&', '')};")  # one endless name
    assert time.process_time() - begin < 2.0  # some hundredths of a second; the square of the length is ten


def rendered(template: str, **fields: str) -> str:
    return ItemText(template).render(ItemTable(["a"], {name: [value] for name, value in fields.items()}))[0]


@pytest.mark.parametrize(
    "template, fields, expected",
    [
        ("{title}", {"title": "Alien"}, "Alien"),
        ("{title} by {brand}", {"title": "Tape", "brand": "3M"}, "Tape by 3M"),
        ("{title} by {brand}", {"title": "Tape", "brand": ""}, "Tape"),
        ("{title} by {brand}", {"title": "", "brand": "3M"}, "3M"),
        ("{title} by {brand}", {"title": "", "brand": ""}, ""),
        ("Film: {title}, {year}", {"title": "", "year": "1979"}, "Film: 1979"),
        ("{title} ({year})", {"title": "Alien", "year": "1979"}, "Alien (1979)"),
        ("{title} ({year})", {"title": "Alien", "year": ""}, "Alien"),
        ("{title} ({year})", {"title": "", "year": "1979"}, "(1979)"),
        ("{title} ({year}), {genre}", {"title": "Alien", "year": "", "genre": "Horror"}, "Alien, Horror"),
        ("{title} ({year}, {genre})", {"title": "Alien", "year": "", "genre": "Horror"}, "Alien (Horror)"),
        ("{title} ({year}, {genre})", {"title": "Alien", "year": "1979", "genre": ""}, "Alien (1979)"),
        ("{title} ({year}, {genre})", {"title": "Alien", "year": "", "genre": ""}, "Alien"),
        ("({year}) {title}", {"title": "Alien", "year": ""}, "Alien"),
        ("Title: {title}.", {"title": "Alien"}, "Title: Alien."),
        ("{title} {{new}}", {"title": "Alien"}, "Alien {new}"),
        ("{title}: {title}", {"title": "Alien"}, "Alien: Alien"),
    ],
)
def test_render(template: str, fields: dict[str, str], expected: str) -> None:
    assert rendered(template, **fields) == expected


def test_render_cuts_to_a_budget_of_words() -> None:
    table = ItemTable(["a", "b"], {"title": ["one two three four", "one"]})
    assert ItemText("{title}", max_words=2).render(table) == ["one two", "one"]


def test_unknown_field_lists_the_fields() -> None:
    with pytest.raises(ValueError, match=r"unknown field, got 'titel'; available: brand, title"):
        rendered("{titel}", title="Alien", brand="")


@pytest.mark.parametrize(
    "template, message",
    [
        ("no field", "must name a field in braces, got 'no field'"),
        ("{title", "must have paired braces"),
        ("{title!r}", "must be a plain name"),
        ("{}", "must be a plain name"),
    ],
)
def test_bad_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemText(template)


def test_max_words_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_words must be at least 1, got 0"):
        ItemText("{title}", max_words=0)


def test_a_field_cannot_reach_into_objects() -> None:
    with pytest.raises(ValueError, match=r"unknown field, got 'title\.__class__'"):
        rendered("{title.__class__}", title="Alien")
