"""Data sets on disk: what is written is read back, damage is found, and a target is whole or absent."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laser_fast.data import ItemTable, Manifest, SequenceDataset, leave_one_out, write_dataset
from laser_fast.data import dataset as dataset_module
from laser_fast.data.dataset import ARRAY_FILES, DATA_FILES
from laser_fast.files.sealed import seal


def example(texts: tuple[str, str, str] = ("Alien", "", "Das Boot")) -> SequenceDataset:
    items = ItemTable(["../evil", "b/c", "Ünï"], {"title": texts, "brand": ["x", "y", "z"]})
    return SequenceDataset(
        items=items,
        user_ids=["u\t1", "", "..\\u3"],
        offsets=np.array([0, 3, 3, 5]),
        item_index=np.array([2, 0, 2, 1, 0], dtype=np.int32),
        timestamps=np.array([1, 1, 4, -3, 9]),
        manifest=Manifest(format="memory", tie_rule="hash:4"),
    )


def assert_equal(one: SequenceDataset, other: SequenceDataset) -> None:
    assert one.items.ids == other.items.ids
    assert one.items.fields == other.items.fields
    assert one.user_ids == other.user_ids
    for name in ("offsets", "item_index", "timestamps"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype


def test_written_and_loaded_are_equal(tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "deep" / "set", example())
    loaded = SequenceDataset.load(tmp_path / "deep" / "set")
    names = {path.name for path in (tmp_path / "deep" / "set").iterdir()}  # fixed ones, whatever the ids
    assert names == {*DATA_FILES, "manifest.json", "seal.json"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set"]
    assert_equal(written, example())
    assert_equal(loaded, example())
    assert loaded.manifest == written.manifest
    assert loaded.manifest.counts == {"users": 3, "items": 3, "interactions": 5}
    assert loaded.manifest.dataset_hash == example().hash()
    assert leave_one_out(loaded).hash == leave_one_out(example()).hash


def test_arrays_are_memory_mapped_and_read_only(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", example())
    loaded = SequenceDataset.load(tmp_path / "set")
    assert not loaded.item_index.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        loaded.item_index[0] = 1


def test_sequence() -> None:
    assert example().sequence(0).tolist() == [2, 0, 2]
    assert example().sequence(1).tolist() == []
    with pytest.raises(ValueError, match=r"user must lie in 0\.\.2, got 3"):
        example().sequence(3)


def test_float_timestamps_and_no_user(tmp_path: Path) -> None:
    times = replace(example(), timestamps=np.array([0.25, 0.5, 4, -3.5, 9]))
    assert_equal(write_dataset(tmp_path / "float", times), times)
    nobody = SequenceDataset.from_lists([], ItemTable(["a"]))
    assert_equal(write_dataset(tmp_path / "nobody", nobody), nobody)


@pytest.mark.parametrize("name", [*DATA_FILES, "manifest.json"])
def test_a_changed_file_is_named(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path / "set", example())
    path = tmp_path / "set" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 3  # of the manifest: a tab in place of the last line feed
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{name} of .*set must be the file that was written, with SHA-256 \w+, got \w+"
    ):
        SequenceDataset.load(tmp_path / "set")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", example())
    (tmp_path / "set" / "offsets.npy").unlink()
    with pytest.raises(ValueError, match=r"set must be whole, got no offsets\.npy"):
        SequenceDataset.load(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"needs manifest\.json, got none in .*; run `laser-fast prepare`"):
        SequenceDataset.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ARRAY_FILES)
def test_pickled_arrays_are_refused(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path / "set", example())
    np.save(tmp_path / "set" / name, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    seal(tmp_path / "set")
    with pytest.raises(ValueError, match=r"[Pp]ython object|allow_pickle"):
        SequenceDataset.load(tmp_path / "set", verify=False)


def test_a_data_set_of_an_older_version_is_refused_by_its_schema(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", example())
    (tmp_path / "set" / "seal.json").unlink()
    with pytest.raises(ValueError, match=r"set must have seal\.json, got none; copy the whole folder"):
        SequenceDataset.load(tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 2', '"schema": 1'))
    with pytest.raises(ValueError, match=r"manifest\.json must have schema 2, got 1; prepare the data set again"):
        SequenceDataset.load(tmp_path / "set")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offsets": np.array([0, 3, 5])}, "offsets must rise from 0 to 5 in 3 steps, got 2 steps"),
        ({"offsets": np.array([0, 4, 3, 5])}, "offsets must rise"),
        ({"item_index": np.array([2, 0, 3, 1, 0], dtype=np.int32)}, r"item_index must lie in 0\.\.2, got 3"),
        ({"item_index": np.array([2, 0, -1, 1, 0], dtype=np.int32)}, r"item_index must lie in 0\.\.2, got -1"),
        ({"user_ids": ["a", "b", "a"]}, "user ids must be distinct, got 'a' twice"),
        ({"timestamps": np.array([1, 0, 4, -3, 9])}, "must not fall within a user, got a fall for user 'u"),
        ({"timestamps": np.array([1, 1, 4, 3, 2])}, "got a fall for user '..."),
        ({"timestamps": np.array([1, 1, np.nan, 3, 4])}, "timestamps must be finite, got NaN"),
        ({"timestamps": np.array([1, 1])}, r"one entry per event \(5\), got 2"),
    ],
    ids=["short", "falls", "item too large", "item negative", "user", "time", "last user's time", "NaN", "times"],
)
def test_rules_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(example(), **change)  # type: ignore[arg-type]


def test_dtypes_are_checked() -> None:
    with pytest.raises(TypeError, match="item_index int32 and timestamps int64 or float64, got int64, int64, int64"):
        replace(example(), item_index=np.array([2, 0, 2, 1, 0]))


def test_from_lists_checks_items() -> None:
    with pytest.raises(ValueError, match=r"items must lie in 0\.\.0, got 1"):
        SequenceDataset.from_lists([[0, 1]], ItemTable(["a"]))


def test_hash_follows_the_texts() -> None:
    assert example().hash() == example().hash()
    assert example().hash() != example(("Alien", "", "Das  Boot")).hash()


def test_a_target_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="must be empty or a data set, got other files"):
            write_dataset(tmp_path / "photos", example(), overwrite=overwrite)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="must be a folder, got the file"):
        write_dataset(tmp_path / "file", example(), overwrite=True)


def test_overwrite_replaces_and_an_empty_folder_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_dataset(tmp_path / "set", example())
    with pytest.raises(FileExistsError, match="use overwrite"):
        write_dataset(tmp_path / "set", example())
    other = example(("a", "b", "c"))
    assert_equal(write_dataset(tmp_path / "set", other, overwrite=True), other)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_a_failure_midway_leaves_nothing_or_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        write_dataset(tmp_path / "set", example())
    save = np.save

    def failing_save(path: Path, *args: object, **kwargs: object) -> None:
        if path.name == "timestamps.npy":
            raise OSError("disk full")
        save(path, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module.np, "save", failing_save)
        with pytest.raises(OSError, match="disk full"):
            write_dataset(tmp_path / "set", example(("a", "b", "c")), overwrite=existing)
    assert [path.name for path in tmp_path.iterdir()] == ["set"] * existing
    if existing:
        assert_equal(SequenceDataset.load(tmp_path / "set"), example())
