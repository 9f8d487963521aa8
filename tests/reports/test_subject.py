"""The files of a run as a report reads them: what is damaged, or no run at all, is named."""

import json
from pathlib import Path

import pytest

from laser_fast.reports import read_run


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a run of `laser-fast train` must be given, got '.*nothing' without"):
        read_run(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text("width: 8\n")  # of a recommender
    with pytest.raises(FileNotFoundError, match="must be given"):
        read_run(tmp_path)


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
