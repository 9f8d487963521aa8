"""YAML is read by one function: what is short stays small, and an error has a file, a line and a column."""

import time
from pathlib import Path

import pytest
import yaml

from laser_fast.config.yaml_text import parse_yaml, read_yaml

SOURCES = Path(__file__).resolve().parents[2] / "laser_fast"


def test_plain_values() -> None:
    text = "a: {b: [1, 2.5, null, on]}\nday: 2024-01-31\n'a b': 'ü'\nempty:\n"
    values = parse_yaml(text, "a file")
    assert values["a"] == {"b": [1, 2.5, None, True]} and str(values["day"]) == "2024-01-31"
    assert values["a b"] == "ü" and values["empty"] is None
    assert parse_yaml("", "nothing") is None and parse_yaml("3", "a number") == 3


def laughs(levels: int) -> str:
    """Nine aliases a level: 9^levels values in some hundred characters."""
    lines = ["l0: &l0 [ha]"]
    lines += [f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]" for level in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(10), "aliases must stand for at most 10,000 values in all at line 5, column "),
        ("a: &x {<<: *x}", "alias 'x' must not stand in what it names at line 1, column 12"),
        (f"a: &a {'[' * 12}1{']' * 12}\nb: {'[' * 8}*a{']' * 8}", "nested at most 20 levels deep at line 2, column 12"),
        ("[" * 10**5, "values must be nested at most 20 levels deep at line 1, column 21"),
        ("a: 1\nb: 2\na: 3", "key 'a' must be set once at line 3, column 1"),
        ("s:\n  a: 1\n  'a': 3", "key 'a' must be set once at line 3, column 3"),
        ("a: [1", "line 1, column 6"),
        ("a: 1\n\tb: 2", "cannot start any token at line 2, column 1"),
        ("- 1\n---\n- 2", "another document at line 2, column 1"),
        ("a: 2024-99-99", "month must be in 1..12 at line 1, column 4"),
        (f"a: {'9' * 5000}", "a number must have at most 100 characters, got 5000 at line 1, column 4"),
        (f"a: [{':'.join(['59'] * 10**5)}]", "a number must have at most 100 characters, got 299999 at"),
        ("a: \x00", r"character '\\x00' at 3"),
        ("a: !!python/name:os.system", "could not determine a constructor .* at line 1, column 4"),
    ],
    ids=lambda value: value[:25],
)
def test_refused_text_is_placed(text: str, message: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(
        ValueError, match=f"parse_yaml: run.yaml must be YAML without faults, got one: .*{message}"
    ) as caught:
        parse_yaml(text, "run.yaml")
    assert time.perf_counter() - begin < 5
    assert "\n" not in str(caught.value)


def test_aliases_stand_for_what_they_name() -> None:
    shared = {"ks": [1, 5, 10], "name": "x"}
    text = yaml.safe_dump({"a": shared, "b": shared, "c": [shared["ks"]] * 3})
    assert "*id" in text
    assert parse_yaml(text, "a dump") == {"a": shared, "b": shared, "c": [[1, 5, 10]] * 3}
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}", "a merge") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"config.yaml must be UTF-8, got byte 0xff at 3"):
        read_yaml(path)
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ValueError, match="config.yaml must have at most 1,048,576 bytes, got more"):
        read_yaml(path)
    path.write_bytes(b"# nothing yet\n")
    assert read_yaml(path) == {}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must hold keys and values, got a list"):
        read_yaml(path)
    with pytest.raises(IsADirectoryError):
        read_yaml(tmp_path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no endless file here")
def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(ValueError, match="/dev/zero must have at most"):
        read_yaml("/dev/zero")


def test_nobody_reads_yaml_another_way() -> None:
    for file in SOURCES.rglob("*.py"):
        if file.name != "yaml_text.py":
            source = file.read_text(encoding="utf-8")
            assert "yaml.safe_load" not in source and "yaml.load" not in source, file
