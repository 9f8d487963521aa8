"""Seals: what is damaged, swapped, missing or added is found by its name, and big files are read once, when needed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from laser_fast.data import SequenceDataset
from laser_fast.files import sealed as module
from laser_fast.files.sealed import SEAL, SealedFolder, seal

_FILE = {"size": 1, "sha256": "0" * 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "inner").mkdir(parents=True)
    (path / "weights.bin").write_bytes(b"some weights")
    (path / "inner" / "values.json").write_bytes(b"{}")
    (path / "README.md").write_text("a card")
    seal(path)
    return path


def test_what_was_sealed_is_given_out(folder: Path) -> None:
    assert set(json.loads((folder / SEAL).read_text())["files"]) == {"weights.bin", "inner/values.json"}
    opened = SealedFolder(folder)
    opened.compare_all()
    assert opened.file("weights.bin") == folder / "weights.bin"
    assert opened.read("inner/values.json") == b"{}"


def test_cards_and_files_of_others_are_nobodys_business(folder: Path) -> None:
    (folder / "README.md").write_text("an edited card")
    (folder / ".gitattributes").write_text("*.bin filter=lfs")
    opened = SealedFolder(folder)
    opened.compare_all()
    for name in ("README.md", ".gitattributes"):
        with pytest.raises(ValueError, match=rf"{name} must be among the files of seal\.json in .*, got one that was"):
            opened.file(name)
    with pytest.raises(ValueError, match=r"rules\.bin must be among the files of seal\.json in .*model, got none"):
        opened.read("rules.bin")


def test_another_content_is_refused_when_it_is_asked_for(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"Some weights")
    opened = SealedFolder(folder)
    assert opened.read("inner/values.json") == b"{}"
    message = r"weights\.bin of .*model must be the file that was written, with SHA-256 [0-9a-f]{12}, got [0-9a-f]{12}"
    for ask in (opened.file, opened.read):
        with pytest.raises(ValueError, match=message):
            ask("weights.bin")
    with pytest.raises(ValueError, match=message):
        opened.compare_all()


def test_another_size_or_none_is_refused_at_once(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"weights\.bin of .*model must be .*, of 12 bytes, got 7; copy it again"):
        SealedFolder(folder)
    (folder / "weights.bin").unlink()
    with pytest.raises(ValueError, match=r"must be whole, got no weights\.bin \(seal\.json names it\); copy the whole"):
        SealedFolder(folder)
    (folder / SEAL).unlink()
    with pytest.raises(ValueError, match=r"model must have seal\.json, got none; copy the whole folder, or write it"):
        SealedFolder(folder)


def test_a_file_is_read_once_and_only_when_it_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda path: read.append(path.name) or digest(path))
    opened = SealedFolder(folder)
    assert read == []
    for _ in range(3):
        opened.file("weights.bin")
    assert read == ["weights.bin"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"seal\.json of .*model must have format 1, got 2; write it again"),
        ({"files": {"../../secret": _FILE}}, r"names must lie in the folder, got '../../secret'"),
        ({"files": {"/secret": _FILE}}, "names must lie in the folder, got '/secret'"),
        ({"files": {"a": {"size": 12}}}, r"key 'files\.a\.sha256' must be set, got nothing"),
        ({"files": {"a": _FILE | {"sha256": "none"}}}, r"files\.a\.sha256: String .*, got 'none'"),
    ],
    ids=["format", "outside", "absolute", "no digest", "digest"],
)
def test_a_seal_that_is_none_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    values = json.loads((folder / SEAL).read_text())
    (folder / SEAL).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
        SealedFolder(folder)


def test_a_damaged_data_set_is_refused_or_equal(
    tiny_data: Path, tmp_path: Path, damage_files: Callable[..., int]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(tiny_data, folder)
    whole = SequenceDataset.load(folder)

    def same(loaded: SequenceDataset) -> bool:
        return loaded.manifest == whole.manifest and loaded.hash() == whole.hash()

    assert damage_files(folder, lambda: SequenceDataset.load(folder), same, 210) > 190
