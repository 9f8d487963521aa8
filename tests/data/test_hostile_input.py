"""Random damage to every kind of source: a data set comes out, or an error that is documented and says what to look at.

`LASER_FAST_NIGHTLY=1` runs ten thousand examples.
"""

import gzip
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from laser_fast.data import PrepareRequest, SequenceDataset, prepare
from laser_fast.data.readers import BadRowError
from laser_fast.files import atomic

EXAMPLES = 10_000 if os.environ.get("LASER_FAST_NIGHTLY") else 80
DOCUMENTED = (ValueError, BadRowError, FileNotFoundError, FileExistsError)

PLAIN = ["u1", "u2", "a", "b", "1", "2", "3.5"]
ODD = [
    *("", " ", "nan", "NaN", "inf", "-1", "1e400", "-0", "1_0", "9" * 30, "9" * 5000, str(2**63), str(-(2**63))),
    *(
        "\x00",
        '"',
        'a"b',
        "a,b",
        "a\tb",
        "a::b",
        "a|b",
        "\ufeff",
        "\u0663",
        "\u2028",
        "\r",
        "caf\u00e9",
        "x\ny",
        "&amp;",
    ),
]
cells = st.one_of(st.sampled_from(PLAIN), st.sampled_from(PLAIN + ODD), st.text(max_size=4))
values = st.one_of(
    cells,
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([None, True, [], ["a", ["b"]], {}, {"a": 1}, "\ud800", json.loads("[" * 300 + "]" * 300)]),
)
tables = st.lists(st.lists(values, min_size=4, max_size=4), min_size=0, max_size=6)
good_rows = st.lists(
    st.tuples(st.sampled_from(["u1", "u2"]), st.sampled_from(["a", "b"]), st.just("3"), st.integers(0, 9)), max_size=4
)


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode()


def _delimited(rows: list[list[Any]], delimiter: str, header: str = "") -> bytes:
    return "\n".join([*([header] if header else []), *(delimiter.join(map(_text, row)) for row in rows)]).encode()


def _objects(rows: list[list[Any]], keys: list[str]) -> bytes:
    return "\n".join(json.dumps(dict(zip(keys, row, strict=False))) for row in rows).encode()


def _parquet(rows: list[list[Any]], names: list[str]) -> bytes:
    columns = {}
    for name, column in zip(names, zip(*rows, strict=True), strict=False):
        try:
            columns[name] = pa.array(column)
            pq.write_table(pa.table({name: columns[name]}), io.BytesIO())  # objects without a key cannot be written
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
            columns[name] = pa.array([_text(value) for value in column])
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


NAMES = ["user_id", "item_id", "rating", "timestamp"]
ITEM_NAMES = ["item_id", "title", "genres", "year"]
REVIEW_KEYS = ["user_id", "parent_asin", "rating", "timestamp"]
META_KEYS = ["parent_asin", "title", "description", "store"]
Builder = Callable[[list[list[Any]], list[list[Any]]], dict[str, bytes]]
KINDS: dict[str, Builder] = {
    "csv": lambda log, items: {
        "log.csv": _delimited(log, ",", ",".join(NAMES)),
        "items.csv": _delimited(items, ",", ",".join(ITEM_NAMES)),
    },
    "gz": lambda log, items: {
        "log.tsv.gz": gzip.compress(_delimited(log, "\t", "\t".join(NAMES))),
        "items.jsonl.gz": gzip.compress(_objects(items, ITEM_NAMES)),
    },
    "jsonl": lambda log, items: {"log.jsonl": _objects(log, NAMES), "items.jsonl": _objects(items, ITEM_NAMES)},
    "parquet": lambda log, items: {
        "log.parquet": _parquet(log, NAMES) if log else b"",
        "items.parquet": _parquet(items, ITEM_NAMES) if items else b"",
    },
    "recbole": lambda log, items: {
        "x.inter": _delimited(log, "\t", "user_id:token\titem_id:token\trating:float\ttimestamp:float"),
        "x.item": _delimited(items, "\t", "item_id:token\ttitle:token_seq\tx:float\tyear:token"),
    },
    "ml-100k": lambda log, items: {
        "u.data": _delimited(log, "\t"),
        "u.item": _delimited([[*row[:2], *("0" * 22)] for row in items], "|"),
    },
    "ml-1m": lambda log, items: {
        "ratings.dat": _delimited(log, "::"),
        "movies.dat": _delimited([row[:3] for row in items], "::"),
        "users.dat": b"",
    },
    "ml-csv": lambda log, items: {
        "ratings.csv": _delimited(log, ",", "userId,movieId,rating,timestamp"),
        "movies.csv": _delimited([row[:3] for row in items], ",", "movieId,title,genres"),
    },
    "amazon": lambda log, items: {
        "r.jsonl": _objects(log, REVIEW_KEYS),
        "m.json.gz": gzip.compress(_objects(items, META_KEYS)),
    },
}


def _damaged(content: bytes, how: str, at: float) -> bytes:
    place = int(at * len(content))
    if how == "cut":
        return content[:place]
    if how == "flip" and content:
        place = min(place, len(content) - 1)
        return content[:place] + bytes([content[place] ^ 0xA5]) + content[place + 1 :]
    if how == "latin-1":
        return content.decode("utf-8", "replace").encode("latin-1", "replace")
    return content.decode("utf-8", "replace").encode("utf-16") if how == "utf-16" else content


def _request(folder: Path, kind: str, names: list[str], archive: bool, **options: Any) -> PrepareRequest:
    out, files = folder / "out", [folder / "sources" / name for name in names]
    source = folder / "sources"
    if archive:
        source = folder / "sources.zip"
    if kind == "recbole":
        return PrepareRequest(out, recbole=source, **options)
    if kind.startswith("ml"):
        return PrepareRequest(out, movielens=source, **options)
    if kind == "amazon":
        return PrepareRequest(out, amazon_2023=(files[0], files[1]), **options)
    return PrepareRequest(out, interactions=files[0], items=files[1], **options)


def _write_sources(folder: Path, content: dict[str, bytes], archive_damage: tuple[str, float] | None) -> None:
    (folder / "sources").mkdir()
    for name, payload in content.items():
        (folder / "sources" / name).write_bytes(payload)
    if archive_damage is not None:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
            for name, payload in content.items():
                made.writestr(f"x/{name}", payload)
        (folder / "sources.zip").write_bytes(_damaged(stream.getvalue(), *archive_damage))


def _is_documented(error: Exception) -> bool:
    return type(error) in DOCUMENTED and re.match(r"[\w.()\- ]+: .+, got ", str(error), re.DOTALL) is not None


@pytest.fixture
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "sync", lambda path: None)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="LASER_FAST_NIGHTLY" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_a_data_set_or_a_documented_error(no_waiting_for_disks: None, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    log = [list(row) for row in data.draw(good_rows)] + data.draw(tables)
    items = [["a", "A", "x", "1999"], ["b", "B", "y", "2000"], *data.draw(tables)]
    content = KINDS[kind](log, items)
    how = data.draw(st.sampled_from(["whole", "whole", "cut", "flip", "latin-1", "utf-16"]))
    if kind != "parquet" or how == "cut":  # pages of a Parquet file have no checksum that Arrow looks at
        hurt = data.draw(st.sampled_from(sorted(content)))
        content[hurt] = _damaged(content[hurt], how, data.draw(st.floats(0, 1)))
    archive = kind in ("recbole", "ml-100k", "ml-1m", "ml-csv") and data.draw(st.booleans())
    options = {
        "skip_bad_rows": data.draw(st.booleans()),
        "unknown_items": data.draw(st.sampled_from([None, "drop", "keep"])),
        "min_rating": data.draw(st.sampled_from([None, 2.0])),
        "duplicates": data.draw(st.sampled_from(["all", "last"])),
        "max_history": data.draw(st.sampled_from([None, 2])),
        "from_time": data.draw(st.sampled_from([None, "1"])),
    }
    archive_damage = (data.draw(st.sampled_from(["", "cut", "flip"])), data.draw(st.floats(0, 1)))
    folder = Path(tempfile.mkdtemp(prefix="laser-fast-hostile-"))
    try:
        _write_sources(folder, content, archive_damage if archive else None)
        request = _request(folder, kind, list(content), archive, **options)
        try:
            dataset = prepare(request)
        except Exception as error:
            if not _is_documented(error):
                raise
            event("refused")
            assert not request.out.exists()
        else:
            assert SequenceDataset.load(request.out).hash() == dataset.hash()
            event("prepared")
    finally:
        shutil.rmtree(folder)
