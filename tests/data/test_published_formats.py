"""Data sets as their publishers lay them out, and Parquet: one option each, the same tables as written by hand."""

import argparse
import datetime
import gzip
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laser_fast.cli.prepare import add_arguments, request_of
from laser_fast.data import PrepareRequest, SequenceDataset, prepare
from laser_fast.data.readers import InteractionColumns, read_interactions, read_items, read_rows


def arguments_of(*arguments: object) -> PrepareRequest:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return request_of(parser.parse_args([str(argument) for argument in arguments]))


def named(dataset: SequenceDataset) -> dict[str, list[str]]:
    return {
        user: [dataset.items.ids[item] for item in dataset.sequence(row)] for row, user in enumerate(dataset.user_ids)
    }


def write_gz(path: Path, objects: list[dict[str, object]]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(value) + "\n" for value in objects).encode()))
    return path


def movielens_100k(folder: Path) -> Path:
    folder.mkdir()
    (folder / "u.data").write_text("7\t2\t3\t881250949\n7\t1\t5\t881250940\n8\t3\t1\t3\n")
    flags = {1: "0|0|0|1|1|1", 2: "0|1|1|0|0|0", 3: "1|0|0|0|0|0"}
    titles = {1: "Toy Story (1995)|01-Jan-1995", 2: "Cité, La (1995)|24-May-1996", 3: "unknown|"}
    lines = [f"{item}|{titles[item]}||http://x|{flags[item]}{'|0' * 13}" for item in titles]
    (folder / "u.item").write_bytes(("\n".join(lines) + "\n\n").encode("latin-1"))
    (folder / "u.genre").write_text("unknown|0\nAction|1\n\n")
    (folder / "README").write_text("u.data")
    return folder


def movielens_1m(folder: Path, encoding: str = "latin-1") -> Path:
    folder.mkdir()
    (folder / "ratings.dat").write_text("7::2::3::881250949\n7::1::5::881250940\n8::3::1::3\n")
    films = "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Cité, La (1995)::Action|Adventure\n3::unknown::\n"
    (folder / "movies.dat").write_bytes(films.encode(encoding))
    (folder / ("users.dat" if encoding == "latin-1" else "tags.dat")).write_text("7::F::1::10::48067\n")
    return folder


def movielens_csv(folder: Path) -> Path:
    folder.mkdir()
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n7,2,3.0,881250949\n7,1,5.0,881250940\n8,3,0.5,3\n"
    )
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n1,Toy Story (1995),Animation|Children\'s|Comedy\n2,"Cité, La (1995)",Action|Adventure\n'
        "3,unknown,(no genres listed)\n",
        encoding="utf-8",
    )
    return folder


def zipped(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def archive(folder: Path) -> Path:
        path = folder.with_suffix(".zip")
        with zipfile.ZipFile(path, "w") as made:
            for file in sorted(make(folder).iterdir()):
                made.write(file, f"ml/{file.name}")
        return path

    return archive


def tarred(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def archive(folder: Path) -> Path:
        path = folder.with_name("ml.tar.gz")
        with tarfile.open(path, "w:gz") as made:
            made.add(make(folder), "ml")
        return path

    return archive


RELEASES: dict[str, Callable[[Path], Path]] = {
    "100k": movielens_100k,
    "1m": movielens_1m,
    "10m": lambda folder: movielens_1m(folder, "utf-8"),
    "csv": movielens_csv,
    "100k zip": zipped(movielens_100k),
    "1m tar": tarred(movielens_1m),
    "csv zip": zipped(movielens_csv),
}


@pytest.mark.parametrize("release", RELEASES)
def test_movielens(tmp_path: Path, release: str) -> None:
    source = RELEASES[release](tmp_path / "ml")
    dataset = prepare(arguments_of(tmp_path / "out", "--movielens", source))
    assert dataset.manifest.format == f"movielens-{release.split()[0]}"
    assert dataset.items.ids == ["1", "2", "3"]
    assert dataset.items.fields == {
        "title": ["Toy Story (1995)", "La Cité (1995)", "unknown"],
        "genres": ["Animation, Children's, Comedy", "Action, Adventure", ""],
    }
    assert named(dataset) == {"7": ["1", "2"], "8": ["3"]}
    assert dataset.timestamps.tolist() == [881250940, 881250949, 3]
    names = [source.name] if source.is_file() else sorted(file.name for file in source.iterdir() if file.suffix)
    assert {entry.name for entry in dataset.manifest.sources} <= set(names)
    assert len(dataset.manifest.sources) == (1 if source.is_file() else 2)


def test_movielens_ratings_and_chosen_texts(tmp_path: Path) -> None:
    source = movielens_csv(tmp_path / "ml")
    arguments = (tmp_path / "out", "--movielens", source, "--min-rating", 3, "--text-columns", "genres")
    dataset = prepare(arguments_of(*arguments))
    assert named(dataset) == {"7": ["1", "2"]}
    assert list(dataset.items.fields) == ["genres"]
    with pytest.raises(ValueError, match="unknown text column, got 'plot'; available: title, genres"):
        prepare(PrepareRequest(tmp_path / "other", movielens=source, text_columns=("plot",)))


def test_movielens_must_be_one_release(tmp_path: Path) -> None:
    folder = movielens_1m(tmp_path / "ml")
    (folder / "movies.dat").unlink()
    with pytest.raises(ValueError, match=r"one pair of u\.data and u\.item, .* got ratings\.dat \(1\) in ml"):
        prepare(PrepareRequest(tmp_path / "out", movielens=folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got none of them in empty"):
        prepare(PrepareRequest(tmp_path / "out", movielens=tmp_path / "empty"))
    with pytest.raises(
        FileNotFoundError, match="the MovieLens source must be a folder or an archive .*, got .*nothing"
    ):
        prepare(PrepareRequest(tmp_path / "out", movielens=tmp_path / "nothing"))


def amazon_2018(folder: Path) -> tuple[Path, Path]:
    review = {"verified": True, "reviewTime": "01 1, 2018", "style": {"Size:": "L"}, "summary": "Comfy", "vote": "2"}
    reviews = [
        {**review, "reviewerID": "AU1", "asin": "B2", "overall": 5.0, "unixReviewTime": 1514764800},
        {**review, "reviewerID": "AU1", "asin": "B1", "overall": 2.0, "unixReviewTime": 1500000000},
        {**review, "reviewerID": "AU2", "asin": "B9", "overall": 4.0, "unixReviewTime": 1514764801},
    ]
    metadata: list[dict[str, object]] = [
        {
            "category": ["Clothing", "Shirts"],
            "title": "Tee &amp; top",
            "brand": "ACME",
            "asin": "B1",
            "also_buy": ["B2"],
        },
        {"category": [], "description": ["<p>Two parts.</p>", "One box."], "title": "Box", "asin": "B2", "details": {}},
        {"title": "Box again", "asin": "B2"},
        {"title": "Never bought", "asin": "B3"},
    ]
    return write_gz(folder / "Fashion.json.gz", reviews), write_gz(folder / "meta_Fashion.json.gz", metadata)


def amazon_2023(folder: Path) -> tuple[Path, Path]:
    review = {"title": "Nice", "text": "...", "images": [], "helpful_vote": 0, "verified_purchase": True}
    reviews = [
        {**review, "user_id": "AU1", "asin": "B2x", "parent_asin": "B2", "rating": 5.0, "timestamp": 1514764800000},
        {**review, "user_id": "AU1", "asin": "B1", "parent_asin": "B1", "rating": 2.0, "timestamp": 1500000000000},
        {**review, "user_id": "AU2", "asin": "B9", "parent_asin": "B9", "rating": 4.0, "timestamp": 1514764801000},
    ]
    metadata: list[dict[str, object]] = [
        {"title": "Tee &amp; top", "store": "ACME", "categories": ["Clothing", "Shirts"], "parent_asin": "B1"},
        {"title": "Box", "description": ["<p>Two parts.</p>", "One box."], "store": None, "price": None}
        | {"parent_asin": "B2", "categories": [], "features": ["deep", "wide"]},
        {"title": "Never bought", "parent_asin": "B3"},
    ]
    return write_gz(folder / "Fashion.jsonl.gz", reviews), write_gz(folder / "meta_Fashion.jsonl.gz", metadata)


@pytest.mark.parametrize("year, unit", [("2018", 1), ("2023", 1000)])
def test_amazon(tmp_path: Path, year: str, unit: int) -> None:
    pair = {"2018": amazon_2018, "2023": amazon_2023}[year](tmp_path)
    dataset = prepare(arguments_of(tmp_path / "out", f"--amazon-{year}", *pair))
    assert dataset.items.ids == ["B1", "B2", "B9"]  # bought ones only, also those without metadata
    assert dataset.items.fields == {
        "title": ["Tee & top", "Box", ""],
        "brand": ["ACME", "", ""],
        "categories": ["Clothing, Shirts", "", ""],
        "description": ["", "Two parts. One box.", ""],
    }
    assert named(dataset) == {"AU1": ["B1", "B2"], "AU2": ["B9"]}
    assert dataset.timestamps.tolist() == [1500000000 * unit, 1514764800 * unit, 1514764801 * unit]
    assert dataset.manifest.counts.get("repeated_items", 0) == (1 if year == "2018" else 0)
    window = ("--from-time", "2018-01-01", "--to-time", "2018-01-01T00:00:01")  # one second, in the unit of the release
    second = arguments_of(tmp_path / "second", f"--amazon-{year}", *pair, *window)
    assert named(prepare(second)) == {"AU1": ["B2"]}
    rated = arguments_of(tmp_path / "rated", f"--amazon-{year}", *pair, "--min-rating", 4)
    assert named(prepare(rated)) == {"AU1": ["B2"], "AU2": ["B9"]}


def test_amazon_texts_can_be_chosen_by_field_or_key(tmp_path: Path) -> None:
    pair = amazon_2023(tmp_path)
    chosen = PrepareRequest(tmp_path / "out", amazon_2023=pair, text_columns=("store", "features", "title"))
    fields = prepare(chosen).items.fields
    assert fields["brand"] == ["ACME", "", ""] and fields["features"] == ["", "deep wide", ""]
    assert sorted(fields) == ["brand", "features", "title"]
    with pytest.raises(
        ValueError, match="the item must be in the item file .*, got 'B9' in line 3, column 'parent_asin'"
    ):
        prepare(replace(chosen, out=tmp_path / "strict", unknown_items="error"))


def recbole(folder: Path) -> Path:
    folder.mkdir()
    (folder / "x.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\tseen:float_seq\n1\t7\t5\t2\t1.5 2\n1\t8\t1\t1\t\n"
    )
    (folder / "x.item").write_text(
        "item_id:token\tname:token_seq\tprice:float\tvector:float_seq\tkind:token\n"
        "8\tblue cube\t1.5\t0.1 0.2\ta\n7\tred\t\t\tb\n"
    )
    (folder / "x.user").write_text("user_id:token\tage:float\n1\t30\n")
    (folder / "x.kg").write_text("head_id:token\n")
    return folder


@pytest.mark.parametrize("archived", [False, True])
def test_recbole_with_all_types(tmp_path: Path, archived: bool) -> None:
    source = zipped(recbole)(tmp_path / "x") if archived else recbole(tmp_path / "x")
    said: list[str] = []
    dataset = prepare(arguments_of(tmp_path / "out", "--recbole", source), say=said.append)
    assert dataset.items.fields == {"name": ["blue cube", "red"], "kind": ["a", "b"]}
    assert named(dataset) == {"1": ["8", "7"]}
    assert "not used: x.kg, x.user" in said[0]
    asked = PrepareRequest(tmp_path / "all", recbole=source, text_columns=("price", "vector"))
    assert prepare(asked).items.fields == {"price": ["1.5", ""], "vector": ["0.1 0.2", ""]}


def test_recbole_ids_must_be_single_tokens(tmp_path: Path) -> None:
    folder = recbole(tmp_path / "x")
    log = folder / "x.inter"
    log.write_text(log.read_text().replace("item_id:token", "item_id:token_seq"))
    with pytest.raises(ValueError, match=r"x\.inter: the column 'item_id' must be declared as token, got token_seq"):
        prepare(PrepareRequest(tmp_path / "out", recbole=folder))


def parquet(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    "times",
    [
        pa.array([3, 1, 2]),
        pa.array([3.0, 1.0, 2.0]),
        pa.array([3000, 1000, 2000], pa.timestamp("ms", tz="UTC")),
        pa.array([3 * 10**9, 10**9, 2 * 10**9], pa.timestamp("ns")),
        pa.array(["3", "1", "2"]).dictionary_encode(),
        pa.array([3, 1, 2], pa.int32()).cast(pa.decimal128(12, 0)),
    ],
    ids=lambda times: str(times.type),
)
def test_parquet_logs(tmp_path: Path, times: pa.Array) -> None:
    users, items = pa.array(["u1", "u2", "u1"]).dictionary_encode(), pa.array([7, 8, 8])
    log = parquet(tmp_path / "log.parquet", timestamp=times, item_id=items, unused=items, user_id=users)
    read = read_interactions(log, InteractionColumns(), None)
    assert (read.user_ids, read.item_ids, read.user_index.tolist()) == (["u1", "u2"], ["7", "8"], [0, 1, 0])
    assert read.timestamps.tolist() == [3, 1, 2] and read.timestamps.dtype == "int64"


def test_parquet_times_finer_than_seconds_and_days(tmp_path: Path) -> None:
    times = pa.array([datetime.datetime(1970, 1, 1, 0, 0, 1, 500_000), None], pa.timestamp("us"))
    days = pa.array([datetime.date(1970, 1, 2), None])
    rows = list(read_rows(parquet(tmp_path / "x.parquet", time=times, day=days), ["time", "day"]))
    assert [row.values for row in rows] == [[1.5, 86400], [None, None]]


def test_parquet_items_and_bad_values(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "items.parquet",
        item_id=pa.array(["a", "b", None]),
        title=pa.array(["A", None, "C"]),
        tags=pa.array([["x", "y"], [], None]),
        year=pa.array([1999, None, 2]),
    )
    with pytest.raises(ValueError, match=r"items\.parquet: an id must be .*, got None in row 3, column 'item_id'"):
        read_items(path, "item_id", ["title"])
    good = parquet(path, item_id=pa.array(["a", "b"]), title=pa.array(["A", None]), tags=pa.array([["x", "y"], []]))
    assert read_items(good, "item_id", ["title", "tags"])[1] == {"title": ["A", ""], "tags": ["x, y", ""]}
    with pytest.raises(
        ValueError, match=r"items\.parquet: unknown column, got 'plot'; available: item_id, title, tags"
    ):
        read_items(good, "item_id", ["plot"])
    good.write_bytes(good.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"items\.parquet: the file must be a whole Parquet file, got "):
        read_items(good, "item_id", ["title"])


def test_parquet_by_the_command(tmp_path: Path) -> None:
    log = parquet(tmp_path / "log.parquet", user_id=pa.array([1, 1]), item_id=pa.array(["a", "b"]), t=pa.array([2, 1]))
    items = parquet(tmp_path / "items.parquet", item_id=pa.array(["a", "b"]), title=pa.array(["A", "B"]))
    request = arguments_of(tmp_path / "out", "--interactions", log, "--items", items, "--time-column", "t")
    assert named(prepare(request)) == {"1": ["b", "a"]}


def test_a_second_run_does_nothing_in_every_format(tmp_path: Path) -> None:
    sources: dict[str, dict[str, object]] = {
        "movielens": {"movielens": zipped(movielens_csv)(tmp_path / "ml")},
        "recbole": {"recbole": recbole(tmp_path / "x")},
        "amazon": {"amazon_2023": amazon_2023(tmp_path)},
        "filters": {"recbole": tmp_path / "x", "from_time": "1", "duplicates": "last", "max_history": 3}
        | {"min_history": 2, "text_max_words": 1, "skip_bad_rows": True},
    }
    for name, source in sources.items():
        request, said = PrepareRequest(tmp_path / name, **source), []  # type: ignore[arg-type, var-annotated]
        prepare(request)
        before = {path.name: path.stat().st_mtime_ns for path in request.out.iterdir()}
        prepare(request, say=said.append)
        assert {path.name: path.stat().st_mtime_ns for path in request.out.iterdir()} == before
        assert "nothing written" in said[0]
