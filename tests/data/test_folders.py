"""A folder is replaced as a whole or not at all."""

from pathlib import Path

import pytest

from laser_fast.data.folders import remove_leftovers, replace_directory, scratch_directory, whole_directory


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
    target.rename(tmp_path / ".target.0123456789ab.old")  # the state in which such a death leaves the disk
    assert (whole_directory(target) / "file").read_text() == "first"
    write(target, "second")
    assert (whole_directory(target) / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder: .*absent"):
        whole_directory(tmp_path / "absent")


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    target, others = tmp_path / "target", [tmp_path / "target.old", tmp_path / ".target.mine.old"]
    for other in others:
        write(other, "mine")
    remove_leftovers(target)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        whole_directory(target)
    write(target, "first")
    write(target, "second")
    remove_leftovers(target)
    assert [(other / "file").read_text() for other in others] == ["mine", "mine"]
    assert (target / "file").read_text() == "second"


def test_what_is_beside_a_whole_folder_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, "new")
    write(tmp_path / ".target.0123456789ab.old", "old")  # a death after both renames
    assert (whole_directory(target) / "file").read_text() == "new"
    remove_leftovers(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_scratch_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch_directory(tmp_path / "deep" / "target") as folder:
        (folder / "file").write_text("x")
        remove_leftovers(tmp_path / "deep" / "target")  # of the living nothing is removed
        assert (folder / "file").exists()
    assert not list((tmp_path / "deep").iterdir())
