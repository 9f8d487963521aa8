"""Bad rows skipped: counted by reason, the first ones told in full, and the good ones read as if they stood alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from laser_fast.data import PrepareRequest, prepare
from laser_fast.data.readers import BadRowError, BadRows, InteractionColumns, Layout, read_interactions, read_items

GOOD = "user_id,item_id,timestamp\nu1,a,1\nu2,b,2\nu2,a,3\n"
BAD_LINES = ["u3,a,soon", ",a,1", "u1,a", "u1,zzz,4", 'u1,"a"x,5', "u9,a,inf"]


def log_with(path: Path, *lines: str | bytes) -> Path:
    """The bad lines in front of, between and behind the good ones."""
    header, *good = GOOD.encode().splitlines()
    bad = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"\n".join([header, bad[0], good[0], *bad[1:-1], good[1], good[2], bad[-1]]) + b"\n")
    return path


def test_what_is_left_is_what_stood_alone(tmp_path: Path) -> None:
    (tmp_path / "good.csv").write_text(GOOD)
    alone = read_interactions(tmp_path / "good.csv", InteractionColumns(), ["a", "b"])
    log = log_with(tmp_path / "log.csv", BAD_LINES[0], "caf\u00e9,a,1".encode("latin-1"), *BAD_LINES[1:])
    bad_rows = BadRows(skip=True)
    read = read_interactions(log, InteractionColumns(), ["a", "b"], bad_rows=bad_rows)
    assert (read.user_ids, read.item_ids) == (alone.user_ids, alone.item_ids)
    for name in ("user_index", "item_index", "timestamps"):
        assert getattr(read, name).tolist() == getattr(alone, name).tolist()
    assert bad_rows.total == 7
    assert sorted(bad_rows.by_reason.values()) == [1, 1, 1, 1, 1, 2]
    assert bad_rows.by_reason["log.csv: the value must be a finite number, column 'timestamp'"] == 2
    assert bad_rows.first[0] == "log.csv: the value must be a finite number, got 'soon' in line 2, column 'timestamp'"
    assert bad_rows.first[1] == "log.csv: the text must be UTF-8, got byte 0xe9 in line 4"
    assert "got 'inf' in line 11, column" in bad_rows.first[-1]  # lines that cannot be read count as well
    with pytest.raises(BadRowError, match="got 'soon' in line 2"):
        read_interactions(log, InteractionColumns(), ["a", "b"])


def test_only_the_first_are_listed(tmp_path: Path) -> None:
    log = log_with(tmp_path / "log.csv", *[f"u,a,x{row}" for row in range(30)])
    bad_rows = BadRows(skip=True, listed=20)
    read_interactions(log, InteractionColumns(), None, bad_rows=bad_rows)
    said = bad_rows.describe().splitlines()
    assert said[0] == "skipped 30 bad rows:"
    assert said[1] == "  30: log.csv: the value must be a finite number, column 'timestamp'"
    assert said[2] == "the first 20:" and len(said) == 23 and "'x19'" in said[-1]
    assert BadRows(skip=True).describe() == ""


def test_prepare_counts_them_in_the_manifest(tmp_path: Path) -> None:
    items = [{"item_id": "a", "title": "A"}, {"item_id": "a", "title": "again"}, {"item_id": "b", "title": {}}]
    lines = [*map(json.dumps, items), "{", "[1]", json.dumps({"item_id": "b", "title": "B"})]
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    log = log_with(tmp_path / "log.csv", *BAD_LINES)
    request = PrepareRequest(tmp_path / "out", interactions=log, items=tmp_path / "items.jsonl", skip_bad_rows=True)
    said: list[str] = []
    dataset = prepare(request, say=said.append)
    assert dataset.items.fields == {"title": ["A", "B"]}
    counts = {name: count for name, count in dataset.manifest.counts.items() if name.startswith("bad_rows")}
    assert counts.pop("bad_rows") == sum(counts.values()) == 10
    assert counts["bad_rows: items.jsonl: item ids must be distinct, column 'item_id'"] == 1
    assert counts["bad_rows: items.jsonl: a line must be a JSON object"] == 2
    assert counts["bad_rows: log.csv: a row must have 3 values"] == 1
    assert said[0].startswith("skipped 10 bad rows:") and "got 'zzz' in line 6" in said[0]
    assert "bad rows skipped: 10" in said[1]
    prepare(request, say=said.append)
    assert "bad rows skipped: 10" in said[2] and "nothing written" in said[2]
    with pytest.raises(FileExistsError, match="prepared with other options"):
        prepare(replace(request, skip_bad_rows=False))


@pytest.mark.parametrize("header", ["user_id,item_id,time\xffstamp", 'user_id,"item_id"x,timestamp'])
def test_a_bad_header_is_never_skipped(tmp_path: Path, header: str) -> None:
    (tmp_path / "log.csv").write_bytes(header.encode("latin-1") + b"\nu,a,1\n")
    with pytest.raises(ValueError, match=r"log\.csv: .* in line 1"):
        read_interactions(tmp_path / "log.csv", InteractionColumns(), None, bad_rows=BadRows(skip=True))


def test_nothing_but_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,a,x\n")
    request = PrepareRequest(tmp_path / "out", interactions=tmp_path / "log.csv", skip_bad_rows=True)
    with pytest.raises(ValueError, match="at least one interaction must be left, got none"):
        prepare(request)
    assert not request.out.exists()


def test_values_are_shortened_and_depth_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp\nu,a,{'9x' * 5000}\n")
    with pytest.raises(ValueError, match=r"got '9x9x.*\.\.\. in line 2") as caught:
        read_interactions(tmp_path / "log.csv", InteractionColumns(), None)
    assert len(str(caught.value)) < 400
    deep = "[" * 700 + "]" * 700
    (tmp_path / "items.jsonl").write_text(f'{{"item_id": 1, "title": {deep}}}\n')
    request = PrepareRequest(tmp_path / "out", interactions=tmp_path / "log.csv", items=tmp_path / "items.jsonl")
    with pytest.raises(ValueError, match=r"items\.jsonl: .* in line 1"):
        prepare(request)


@pytest.mark.parametrize(
    "line, rule",
    [
        ('{"item_id": 1, "title": "\\ud800"}', "a text must be valid Unicode, got .* in line 1, column 'title'"),
        (f'{{"item_id": {"9" * 5000}, "title": ""}}', "a line must be a JSON object, got .* in line 1"),
        ("[" * 100_000, "a line must be a JSON object, got .* in line 1"),
    ],
    ids=["half a surrogate pair", "a number of 5000 digits", "deeper than the stack"],
)
def test_json_that_python_itself_refuses(tmp_path: Path, line: str, rule: str) -> None:
    (tmp_path / "items.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=rule) as caught:
        read_items(tmp_path / "items.jsonl", "item_id", ["title"], layout=Layout("json", columns=("item_id", "title")))
    assert type(caught.value) is BadRowError
