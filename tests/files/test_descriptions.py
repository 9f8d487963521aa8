"""Descriptions: what a JSON file must hold is refused by its name where it does not."""

import pytest

from laser_fast.files.descriptions import Description, parse_description


class _Part(Description):
    weight: float


class _Whole(Description):
    format: int
    parts: dict[str, _Part]
    name: str | None


WHERE = "load: whole.json"


def parse(content: str) -> _Whole:
    return parse_description(
        _Whole, content.encode(errors="surrogateescape"), WHERE, version=("format", 3), remedy="write it again"
    )


def part(content: str) -> str:
    return f'{{"format": 3, "parts": {{"a": {content}}}, "name": null}}'


def test_a_description_is_read() -> None:
    found = parse(part('{"weight": 1}'))
    assert found == _Whole(format=3, parts={"a": _Part(weight=1.0)}, name=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"load: whole\.json must be JSON, got EOF"),
        ("{", r"load: whole\.json must be JSON, got EOF"),
        ("\udcff", r"load: whole\.json must be JSON, got expected value"),
        ("[" * 10_000, r"load: whole\.json must be JSON, got recursion limit exceeded"),
        ("[3]", r"load: whole\.json must be a JSON object, got list"),
        ('{"format": 2}', "must have format 3, got 2; write it again"),
        ('{"format": 3.0, "parts": {}, "name": null}', r"format: Input should be a valid integer, got 3\.0$"),
        ('{"format": 3, "name": null}', "whole.json: key 'parts' must be set, got nothing$"),
        ('{"format": 3, "parts": {}, "name": null, "names": 1}', "unknown key 'names', did you mean 'name'\\?$"),
        (part('{"weight": "1"}'), r"parts\.a\.weight: Input should be a valid number, got '1'$"),
        (part('{"weight": NaN}'), r"parts\.a\.weight: Input should be a finite number, got nan$"),
        (part('{"weight": 1e999}'), r"parts\.a\.weight: Input should be a finite number, got inf$"),
        ('{"format": 3, "parts": {' + ", ".join(f'"{n}": 1' for n in range(11)) + '}, "name": null}', "and 1 more$"),
    ],
    ids=[
        "nothing",
        "half",
        "bytes",
        "deep",
        "list",
        "version",
        "type of the version",
        "missing",
        "unknown",
        "type",
        "NaN",
        "infinity",
        "many",
    ],
)
def test_what_breaks_a_rule_is_named(content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(content)
