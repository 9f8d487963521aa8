"""A file or folder is replaced as a whole or not at all, whoever else writes it, and never through a link."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from laser_fast.files import atomic, disk
from laser_fast.files.atomic import (
    is_leftover,
    refuse_others,
    remove,
    remove_leftovers,
    replace_directory,
    replace_file,
    scratch_directory,
    whole_directory,
    write_json,
)
from laser_fast.files.disk import append_line, make_directory


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
    assert (target / "file").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_death_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, "first")
    old = target.rename(tmp_path / ".target.0123456789ab.old")  # the state in which such a death leaves the disk
    assert (whole_directory(target) / "file").read_text() == "first"
    write(target, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    write(old, "first")  # a death after both renames
    assert (whole_directory(target) / "file").read_text() == "second"
    remove_leftovers(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    target, others = tmp_path / "target", [tmp_path / "target.old", tmp_path / ".target.mine.old"]
    for other in others:
        write(other, "mine")
    remove_leftovers(target)
    with pytest.raises(FileNotFoundError, match="no such folder: .*target"):
        whole_directory(target)
    write(target, "first")
    write(target, "second")
    remove_leftovers(target)
    assert [(other / "file").read_text() for other in others] == ["mine", "mine"]
    assert (target / "file").read_text() == "second"


def test_what_others_have_is_never_replaced(tmp_path: Path) -> None:
    folder, names = tmp_path / "model", ("model.json", "README.md")
    refuse_others("save", folder, names)
    folder.mkdir()
    refuse_others("save", folder, names)
    (folder / "README.md").touch()  # a folder with a card alone may be anybody's
    with pytest.raises(FileExistsError, match=r"save: the folder must be new, .* alone, got 'README\.md' at '.*model'"):
        refuse_others("save", folder, names)
    (folder / "model.json").touch()
    refuse_others("save", folder, names)
    (folder / ".git").mkdir()
    with pytest.raises(FileExistsError, match=r"got '\.git' at"):
        refuse_others("save", folder, names)
    with pytest.raises(FileExistsError, match="got a file at .*; choose another"):
        refuse_others("save", folder / "model.json", names)


def test_a_scratch_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch_directory(tmp_path / "deep" / "target") as folder:
        (folder / "file").write_text("x")
        remove_leftovers(tmp_path / "deep" / "target")  # of the living nothing is removed
        assert (folder / "file").exists()
    assert not list((tmp_path / "deep").iterdir())


def test_two_that_write_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes all of it while the first is about to give its own the name."""
    replace, seen = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        if not seen:
            seen.append(source)
            replace_file(target, b"second")
            assert target.read_bytes() == b"second"
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    replace_file(tmp_path / "file", b"first")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_writer_of_a_file_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".file.0123456789ab.partial"
    left.write_bytes(b"ha")
    assert is_leftover(left) and not is_leftover(tmp_path / ".file.mine.partial")
    (tmp_path / ".file.0123456789ac.partial").symlink_to(tmp_path)  # somebody else's
    replace_file(tmp_path / "file", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.0123456789ac.partial", "file"]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.0123456789ac.partial", "file"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = atomic.sync

    def noted(path: Path) -> None:
        synced.append("target" if path == tmp_path / "a" / "target" else path.name)
        sync(path)

    for module in (atomic, disk):
        monkeypatch.setattr(module, "sync", noted)
    with replace_directory(tmp_path / "a" / "target") as fresh:
        (fresh / "inner").mkdir()
        write_json(fresh / "inner" / "file", {})  # syncs nothing: all of it follows, once
    assert synced[0] == tmp_path.name  # in which `a` is new
    assert {"inner", "file"} == set(synced[1:3])
    assert synced[3] == fresh.name and synced[4:] == ["a"]
    synced.clear()
    make_directory(tmp_path / "b" / "c")
    replace_file(tmp_path / "b" / "c" / "file", b"")
    assert synced == [tmp_path.name, "b", "c"]


@pytest.mark.parametrize("umask", [0o002, 0o077, 0o022])
def test_everything_has_the_modes_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replace_directory(tmp_path / "deep" / "target") as fresh:
            save_file({"x": torch.zeros(2)}, fresh / "x.safetensors")  # for its user alone, whatever the umask
            write_json(fresh / "settings.json", {})
            (fresh / "inner").mkdir()
            save_file({"x": torch.zeros(2)}, fresh / "inner" / "x.safetensors")
        append_line(tmp_path / "deep" / "log", b"{}")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o7777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("precious")
    (tmp_path / "run").mkdir()
    link, folder_link = tmp_path / "run" / "file", tmp_path / "run" / "folder"
    link.symlink_to(elsewhere / "file")
    folder_link.symlink_to(elsewhere)
    with pytest.raises(FileExistsError, match="open_no_link: the target must be a file, got the link '.*/run/file'"):
        append_line(link, b"more")
    replace_file(link, b"new")
    write(folder_link, "new")
    for path in (link, folder_link):
        assert not path.is_symlink()
        remove(path)
        path.symlink_to(elsewhere)
        remove(path)
        remove(path)
    assert not list((tmp_path / "run").iterdir())
    assert [path.read_text() for path in elsewhere.iterdir()] == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run"]


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("precious")
    for path in (tmp_path / "log.csv", tmp_path / "log.csv" / "run", tmp_path / "log.csv" / "runs" / "run"):
        with pytest.raises(NotADirectoryError, match="must lie in folders, got the file '.*/log.csv' in place of one"):
            make_directory(path)


def test_a_file_takes_the_place_of_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(FileExistsError, match=r"the target must be a file, got the device or pipe '.*pipe'"):
        replace_file(pipe, b"figures")
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
