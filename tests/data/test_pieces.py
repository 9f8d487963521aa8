"""Arrays looked at piece by piece: nothing is missed, and pages of a mapped file are given back."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from laser_fast.data import ItemTable, Manifest, SequenceDataset, pieces, write_dataset
from laser_fast.data.pieces import update_with_array


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7])
def test_pieces_make_up_the_array(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 3)
    array = np.arange(length)
    found = list(pieces.pieces(array))
    assert [start for start, _ in found] == list(range(0, length, 3))
    assert [value for _, piece in found for value in piece] == array.tolist()
    digest = hashlib.sha256()
    update_with_array(digest, array, "<i4")
    assert digest.hexdigest() == hashlib.sha256(array.astype("<i4").tobytes()).hexdigest()


def mapped_bytes() -> int:
    """Pages of files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssFile")).split()[1])


def test_no_more_of_a_mapped_file_is_in_memory_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(pieces, "PIECE", 2**17)
    np.save(tmp_path / "array.npy", np.arange(2**22, dtype=np.int64))  # 32 MiB
    array = np.asarray(np.load(tmp_path / "array.npy", mmap_mode="r"))
    before, most, total = mapped_bytes(), 0, 0
    for _, piece in pieces.pieces(array):
        total += int(piece.sum())
        most = max(most, mapped_bytes())
    assert total == sum(range(2**22))
    # a piece is 1 MiB; the kernel maps up to 2 MiB around each place touched
    assert most - before < 8 * 2**20
    assert mapped_bytes() - before < 2**20


def test_a_loaded_data_set_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(pieces, "PIECE", 2**17)
    times = np.arange(2**21)  # 16 MiB, and 8 MiB of items
    items = np.zeros(len(times), dtype=np.int32)
    manifest = Manifest(format="memory", tie_rule="file-order")
    offsets = np.array([0, len(times)])
    write_dataset(tmp_path / "set", SequenceDataset(ItemTable(["i"]), ["u"], offsets, items, times, manifest))
    before = mapped_bytes()
    dataset = SequenceDataset.load(tmp_path / "set")
    assert mapped_bytes() - before < 2**21
    assert dataset.hash() == dataset.manifest.dataset_hash
    assert mapped_bytes() - before < 2**21
    assert int(dataset.timestamps.sum()) == int(times.sum())  # looking at it all takes it into memory
    assert mapped_bytes() - before >= 2**24


def test_changes_to_a_private_mapping_are_not_lost(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(9, dtype=np.int64))
    array = np.load(tmp_path / "array.npy", mmap_mode="c")
    array[4] = 7
    for _ in pieces.pieces(array[1:]):
        pass
    assert array.tolist() == [0, 0, 0, 0, 7, 0, 0, 0, 0]


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 100])
def test_checks_see_what_lies_at_the_edge_of_a_piece(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    good = SequenceDataset.from_lists([[0, 1, 2], [], [3, 0], [1, 2, 3]])
    assert write_dataset(tmp_path / "set", good).hash() == good.hash()  # times fall from user to user: 0 1 2 0 1 0 1 2
    starts = {0, 3, 5}
    for event in sorted({*range(8)} - starts):
        times = good.timestamps.copy()
        times[event] = -1
        user = {1: "0", 2: "0", 4: "2", 6: "3", 7: "3"}[event]
        with pytest.raises(ValueError, match=f"must not fall within a user, got a fall for user '{user}'"):
            SequenceDataset(good.items, good.user_ids, good.offsets, good.item_index, times, good.manifest)
        items = good.item_index.copy()
        items[event] = 4
        with pytest.raises(ValueError, match=r"item_index must lie in 0\.\.3, got 4"):
            SequenceDataset(good.items, good.user_ids, good.offsets, items, good.timestamps, good.manifest)
