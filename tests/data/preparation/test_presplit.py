"""Data that come split: rows in, sequences and the source's own split out."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laser_fast.cli import main
from laser_fast.data import SequenceDataset, given_split, leave_one_out, make_split, prepare_presplit

Rows = list[tuple[Any, Any, Any]]
# b's second row does not continue its first; d's history is cut to three, the longest of the file
TRAIN: Rows = [
    ("a", [1], 2),
    ("a", [1, 2], 3),
    ("b", [4], 5),
    ("b", [1], 4),
    ("d", [0, 1, 2], 3),
    ("d", [1, 2, 3], 4),
    ("d", [2, 3, 4], 5),
]
VALID: Rows = [("v", [5, 4], 3), ("a", [1, 2], 5)]


def write(folder: Path, items: int = 6, **parts: Rows) -> Path:
    folder.mkdir(exist_ok=True)
    for part, rows in parts.items():
        lines = [json.dumps(dict(zip(("user", "history", "target"), row, strict=True))) for row in rows]
        (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    lines = [json.dumps({"item_id": item, "title": f"t{item} <b>"}) for item in range(items)]
    (folder / "items.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def prepared(tmp_path: Path) -> SequenceDataset:
    return prepare_presplit(write(tmp_path / "source", train=TRAIN, valid=VALID), tmp_path / "out")


def test_rows_become_sequences_and_the_split_is_the_sources(prepared: SequenceDataset) -> None:
    split = given_split(prepared)
    assert split.train.to_lists() == [[1, 2, 3], [4, 5], [1, 4], [0, 1, 2, 3, 4, 5]]
    assert split.valid.histories.to_lists() == [[5, 4], [1, 2]]
    assert split.valid.targets.tolist() == [3, 5]
    assert len(split.test) == 0
    assert prepared.user_ids == ["a@train.0", "b@train.1", "b@train.2", "d", "v", "a@valid.1"]
    assert prepared.items.fields["title"][0] == "t0"
    assert split.rule == "as the source gives it, ties by file-order"
    assert make_split(prepared, "given").hash == split.hash == prepared.manifest.split_hash


def test_it_survives_the_disk_and_is_left_alone_when_up_to_date(prepared: SequenceDataset, tmp_path: Path) -> None:
    said: list[str] = []
    again = prepare_presplit(tmp_path / "source", tmp_path / "out", say=said.append)
    assert "nothing written" in said[-1]
    assert given_split(again).hash == given_split(prepared).hash
    write(tmp_path / "source", train=TRAIN[:-1], valid=VALID, test=VALID)
    with pytest.raises(FileExistsError, match="prepare_presplit: the target must be empty, got a data set in"):
        prepare_presplit(tmp_path / "source", tmp_path / "out")
    other = prepare_presplit(tmp_path / "source", tmp_path / "out", overwrite=True, say=said.append)
    assert len(given_split(other).test) == 2 and "2 test_rows" in said[-2]


def test_other_splits_of_it_are_refused(prepared: SequenceDataset) -> None:
    with pytest.raises(ValueError, match="came split must be \"given\", got 'leave-one-out'"):
        make_split(prepared)
    with pytest.raises(ValueError, match="leave_one_out: the split must have the hash of the manifest"):
        leave_one_out(prepared)
    with pytest.raises(ValueError, match="must have come split, got format 'memory'"):
        given_split(SequenceDataset.from_lists([[1, 2]]))


def test_a_data_set_that_is_not_its_manifests_is_refused(prepared: SequenceDataset) -> None:
    with pytest.raises(ValueError, match="given_split: the split must have the hash of the manifest"):
        given_split(replace(prepared, user_ids=list("abcdef")))
    counts = {**prepared.manifest.counts, "train_sequences": 9}
    with pytest.raises(ValueError, match="must have 6 sequences together, got 11"):
        given_split(replace(prepared, manifest=replace(prepared.manifest, counts=counts)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", [1], 9), "items must be in the item file, got 9 in line 1, column 'target'"),
        (("a", [7], 1), "items must be in the item file, got 7 in line 1, column 'history'"),
        (("a", "1,2", 1), "a history must be a list of item ids, got '1,2' in line 1, column 'history'"),
        ((None, [1], 1), "an id must be text or a whole number, got None in line 1, column 'user'"),
    ],
)
def test_bad_rows_are_named(row: tuple[Any, Any, Any], message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", train=[row])
    with pytest.raises(ValueError, match=f"train.jsonl.gz: {message}"):
        prepare_presplit(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_left_out(tmp_path: Path) -> None:
    bad: Rows = [("a", [1, 2], 9), ("x", "1,2", 1), (None, [1], 1)]
    source = write(tmp_path / "source", train=[*TRAIN[:2], *bad, *TRAIN[2:]], valid=[*VALID, ("v", [7], 1)])
    said: list[str] = []
    dataset = prepare_presplit(source, tmp_path / "out", skip_bad_rows=True, say=said.append)
    write(tmp_path / "good", train=TRAIN, valid=VALID)
    good = prepare_presplit(tmp_path / "good", tmp_path / "good_out")
    assert dataset.hash() == good.hash()
    counts = dataset.manifest.counts
    assert counts["bad_rows"] == 4
    assert counts["bad_rows: train.jsonl.gz: items must be in the item file, column 'target'"] == 1
    assert dataset.manifest.options["skip_bad_rows"] is True
    assert "skip_bad_rows" not in good.manifest.options
    assert "bad_rows" not in good.manifest.counts
    assert said[0].startswith("skipped 4 bad rows:")
    assert "got '1,2' in line 4, column 'history'" in said[0]
    write(source, train=bad)
    with pytest.raises(ValueError, match="at least one training row must be left, got 4 bad rows"):
        prepare_presplit(source, tmp_path / "none", skip_bad_rows=True)


def test_a_row_left_out_begins_a_new_sequence(tmp_path: Path) -> None:
    source = write(tmp_path / "source", train=[("a", [1], 2), ("a", [1, 2], 9), ("a", [1, 2, 9], 3), ("a", [1, 2], 3)])
    dataset = prepare_presplit(source, tmp_path / "out", skip_bad_rows=True)
    assert given_split(dataset).train.to_lists() == [[1, 2, 3]]
    write(source, items=10, train=[("a", [1], 2), ("a", [1, 2], "?"), ("a", [1, 2, 9], 3)])
    dataset = prepare_presplit(source, tmp_path / "other", skip_bad_rows=True)
    assert given_split(dataset).train.to_lists() == [[1, 2], [1, 2, 9, 3]]


def test_items_may_come_as_parquet(tmp_path: Path) -> None:
    source = write(tmp_path / "source", train=TRAIN, valid=VALID)
    expected = prepare_presplit(source, tmp_path / "lines")
    (source / "items.jsonl").unlink()
    table = {"item_id": list(range(6)), "title": [f"t{item} <b>" for item in range(6)]}
    pq.write_table(pa.table(table), source / "items.parquet")
    assert prepare_presplit(source, tmp_path / "parquet").hash() == expected.hash()


def test_leftovers_are_removed_and_a_lost_name_is_given_back(tmp_path: Path) -> None:
    source = write(tmp_path / "source", train=TRAIN)
    dataset = prepare_presplit(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.0123456789ab.old")
    (tmp_path / ".out.0123456789ab.partial").mkdir()
    said: list[str] = []
    assert prepare_presplit(source, tmp_path / "out", say=said.append).hash() == dataset.hash()
    assert "nothing written" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_folder_without_training_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder must hold train\.jsonl, got none in"):
        prepare_presplit(write(tmp_path / "source", valid=VALID), tmp_path / "out")


def test_the_command_takes_it_and_refuses_options_that_would_do_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--presplit", str(write(tmp_path / "source", train=TRAIN, valid=VALID))]
    assert main(["prepare", str(tmp_path / "out"), *source, "--no-clean", "--skip-bad-rows", "--no-progress"]) == 0
    assert "13 train_events, 4 train_sequences, 2 valid_rows" in capsys.readouterr().out
    assert SequenceDataset.load(tmp_path / "out").items.fields["title"][0] == "t0 <b>"
    refused = ["--min-rating", "3", "--user-column", "who"]
    assert main(["prepare", str(tmp_path / "out2"), *source, *refused]) == 2
    message = "prepare: options must concern data that came split, got --user-column, --min-rating"
    assert message in capsys.readouterr().err


def test_lastfm_has_the_published_counts(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    counts = given_split(prepare_presplit(shared_data("lastfm"), tmp_path / "out")).counts()
    assert (counts["train_sequences"], counts["train_events"], counts["valid_rows"]) == (976, 50_800, 122)
    assert counts["valid_rows_with_cold_target"] == counts["valid_rows_without_history"] == 0
