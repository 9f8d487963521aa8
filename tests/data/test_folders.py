"""A folder is replaced as a whole or not at all."""

from pathlib import Path

import pytest

from laser_fast.data.folders import replace_directory, whole_directory


def write(directory: Path, text: str) -> None:
    with replace_directory(directory) as fresh:
        (fresh / "file").write_text(text)


def test_the_new_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    write(target, "first")
    write(target, "second")
    assert (target / "file").read_text() == "second"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, "first")
    with pytest.raises(TypeError, match="data must be str"):
        write(target, 5)  # type: ignore[arg-type]
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_death_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, "first")
    target.rename(tmp_path / "target.old")  # the state in which such a death leaves the disk
    assert (whole_directory(target) / "file").read_text() == "first"
    write(target, "second")
    assert (whole_directory(target) / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder: .*absent"):
        whole_directory(tmp_path / "absent")
