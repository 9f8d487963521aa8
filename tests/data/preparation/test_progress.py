"""Bars of `prepare`: by bytes of the log and by events, on a terminal and where they are wanted."""

import gzip
import io
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laser_fast.cli import main
from laser_fast.data import PrepareRequest, prepare
from laser_fast.data.readers import archive_members, parquet, read_rows, streams
from laser_fast.data.readers.streams import WatchedSource

LOG = "user_id,item_id,timestamp\n" + "".join(f"u{row % 7},i{row % 5},{row}\n" for row in range(50))


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def request_of(folder: Path) -> PrepareRequest:
    (folder / "log.csv").write_text(LOG)
    return PrepareRequest(folder / "out", interactions=folder / "log.csv", overwrite=True)


def test_bars_tell_bytes_read_and_events_ordered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    prepare(request_of(tmp_path), progress=True, buffer_events=8)
    shown = terminal.getvalue()
    assert re.search(rf"read log: 100%\|.*\| {len(LOG)}/{len(LOG)} .*B/s", shown)
    assert re.search(r"order: 100%\|.*\| 50\.0/50\.0 .* events/s", shown)


def test_no_bars_without_a_terminal_or_where_they_are_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    request = request_of(tmp_path)
    prepare(request)
    arguments = ["prepare", str(tmp_path / "other"), "--interactions", str(tmp_path / "log.csv"), "--overwrite"]
    assert main([*arguments, "--no-progress"]) == 0
    assert terminal.getvalue() == ""
    assert main([*arguments, "--tie-rule", "hash:1"]) == 0
    assert "read log: 100%" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", quiet := io.StringIO())
    prepare(replace(request, out=tmp_path / "third"), progress=True)
    assert quiet.getvalue() == ""


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.jsonl", "log.parquet", "log.zip"])
def test_reports_rise_to_the_size_of_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 10)
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"user_id": list(range(45))}), path)
    elif name.endswith(".jsonl"):
        path.write_text('{"user_id": 1}\n' * 45)
    elif name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("log.csv", LOG)
    else:
        path.write_bytes(gzip.compress(LOG.encode()) if name.endswith(".gz") else LOG.encode())
    source = archive_members(path)[0] if name.endswith(".zip") else path
    plain = [row.values for row in read_rows(source, ["user_id"])]
    reports: list[int] = []
    watched = WatchedSource(source, reports.append)
    assert watched.name == source.name
    assert [row.values for row in read_rows(watched, ["user_id"])] == plain
    text = '{"user_id": 1}\n' * 45 if name.endswith(".jsonl") else LOG
    assert len(reports) == (5 if name.endswith(".parquet") else -(-len(text) // 64))
    assert reports == sorted(reports)
    assert reports[-1] == (len(LOG) if name.endswith(".zip") else path.stat().st_size)
