"""A prepared data set in memory and on disk: item table, one chronological sequence per user, manifest.

On disk a data set is a folder of files with fixed names: `items.parquet`, `users.parquet`, `offsets.npy`,
`item_index.npy`, `timestamps.npy` (memory-mapped on loading), `manifest.json` and the seal of all these. Nothing is
pickled, and no id ever becomes a file name.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laser_fast.data.items import ID_COLUMN, ItemTable, first_duplicate, update_with_strings
from laser_fast.data.manifest import Manifest
from laser_fast.data.pieces import pieces, update_with_array
from laser_fast.data.sequences import PackedSequences, check_range
from laser_fast.files.atomic import replace_directory, whole_directory
from laser_fast.files.sealed import SealedFolder, seal

MANIFEST_FILE = "manifest.json"
ITEMS_FILE = "items.parquet"
USERS_FILE = "users.parquet"
ARRAY_FILES = ("offsets.npy", "item_index.npy", "timestamps.npy")
DATA_FILES = (ITEMS_FILE, USERS_FILE, *ARRAY_FILES)


@dataclass(frozen=True, eq=False)
class SequenceDataset:
    """Users' chronological item sequences over one catalogue.

    Args:
        items: the catalogue, I items; items that occur in no sequence are allowed.
        user_ids: U distinct external user ids.
        offsets: [U+1], int64; user u owns events `offsets[u]` to `offsets[u + 1]`.
        item_index: [n], int32, item of every event, oldest first within a user, the tie rule applied.
        timestamps: [n], int64 or float64, never falling within a user.
        manifest: how the data set was made.

    Raises:
        TypeError: an array has another dtype.
        ValueError: offsets, indices, ids or timestamps break the rules above.
    """

    items: ItemTable
    user_ids: list[str]
    offsets: np.ndarray
    item_index: np.ndarray
    timestamps: np.ndarray
    manifest: Manifest

    def __post_init__(self) -> None:
        self._check_types()
        if (
            len(self.offsets) != len(self.user_ids) + 1
            or self.offsets[0] != 0
            or self.offsets[-1] != len(self.item_index)
            or (np.diff(self.offsets) < 0).any()
        ):
            raise ValueError(
                f"SequenceDataset: offsets must rise from 0 to {len(self.item_index)} in {len(self.user_ids)} steps, "
                f"got {len(self.offsets) - 1} steps to {self.offsets[-1] if len(self.offsets) else None}"
            )
        if len(self.timestamps) != len(self.item_index):
            raise ValueError(
                f"SequenceDataset: timestamps must have one entry per event ({len(self.item_index)}), "
                f"got {len(self.timestamps)}"
            )
        if (repeated := first_duplicate(self.user_ids)) is not None:
            raise ValueError(f"SequenceDataset: user ids must be distinct, got {repeated!r} twice")
        self._check_items()
        self._check_times()

    def _check_types(self) -> None:
        dtypes = [self.offsets.dtype, self.item_index.dtype, self.timestamps.dtype]
        if [str(dtype) for dtype in dtypes[:2]] != ["int64", "int32"] or str(dtypes[2]) not in ("int64", "float64"):
            raise TypeError(
                "SequenceDataset: offsets must be int64, item_index int32 and timestamps int64 or float64, "
                f"got {', '.join(map(str, dtypes))}"
            )
        shapes = (self.offsets.ndim, self.item_index.ndim, self.timestamps.ndim)
        if shapes != (1, 1, 1):
            raise ValueError(f"SequenceDataset: all arrays must be 1-D, got {shapes} dimensions")

    def _check_items(self) -> None:
        for _, piece in pieces(self.item_index):
            check_range(piece, len(self.items), "SequenceDataset: item_index")

    def _check_times(self) -> None:
        before = self.timestamps[:0]  # the last time of the piece before
        for start, piece in pieces(self.timestamps):
            if not np.isfinite(piece).all():
                raise ValueError("SequenceDataset: timestamps must be finite, got NaN or infinity")
            joined = np.concatenate([before, piece])
            falls = 1 + start - len(before) + np.flatnonzero(joined[1:] < joined[:-1])  # positions of events
            users = np.searchsorted(self.offsets, falls, side="right") - 1
            if len(users := users[self.offsets[users] < falls]):  # no fall where a user begins
                raise ValueError(
                    "SequenceDataset: timestamps must not fall within a user, got a fall for user "
                    f"{self.user_ids[int(users[0])]!r}"
                )
            before = joined[-1:]

    @classmethod
    def from_lists(
        cls,
        sequences: Sequence[Sequence[int]],
        items: ItemTable | None = None,
        user_ids: Sequence[str] | None = None,
    ) -> "SequenceDataset":
        """A data set in memory from chronological lists of item indices; timestamps count 0, 1, 2, ... per user.

        Without `items` the catalogue is "0", "1", ... up to the largest index, without `user_ids` users likewise.
        """
        packed = PackedSequences.from_lists(sequences)
        if items is None:
            items = ItemTable([str(index) for index in range(int(packed.items.max(initial=-1)) + 1)])
        check_range(packed.items, len(items), "SequenceDataset.from_lists: items")
        offsets = packed.cu_seqlens.astype(np.int64)
        times = np.arange(len(packed.items), dtype=np.int64) - np.repeat(offsets[:-1], packed.lengths)
        users = [str(user) for user in range(len(packed))] if user_ids is None else list(user_ids)
        manifest = Manifest(format="memory", tie_rule="file-order")
        return cls(items, users, offsets, packed.items.astype(np.int32), times, manifest)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, verify: bool = True) -> "SequenceDataset":
        """Open a prepared folder; the arrays are memory-mapped.

        Args:
            directory: what `write_dataset` or `prepare` wrote.
            verify: compare every file with the SHA-256 in its seal (reads each file once).

        Raises:
            FileNotFoundError: there is no such folder, or no manifest in it.
            ValueError: a file is missing or not the one that was sealed, or its content breaks a rule.
        """
        try:
            folder = whole_directory(Path(directory))
        except FileNotFoundError:
            folder = Path(directory)  # reading its manifest fails with a message that says how to make one
        return _load(folder, verify)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.items)

    def sequence(self, user: int) -> np.ndarray:
        """Items of one user, oldest first, int32 (a view)."""
        if not 0 <= user < self.num_users:
            raise ValueError(f"SequenceDataset.sequence: user must lie in 0..{self.num_users - 1}, got {user}")
        return self.item_index[self.offsets[user] : self.offsets[user + 1]]

    def hash(self) -> str:
        """SHA-256 of the content: items with texts, users, sequences and times. Independent of the files' layout."""
        digest = hashlib.sha256()
        update_with_strings(digest, self.items.ids)
        for name in sorted(self.items.fields):
            update_with_strings(digest, [name])
            update_with_strings(digest, self.items.fields[name])
        update_with_strings(digest, self.user_ids)
        update_with_array(digest, self.offsets, "<i8")
        update_with_array(digest, self.item_index, "<i4")
        kind = "<f8" if self.timestamps.dtype == np.float64 else "<i8"
        digest.update(kind.encode())
        update_with_array(digest, self.timestamps, kind)
        return digest.hexdigest()


def _read_table(path: Path, columns: Sequence[str] | None) -> dict[str, list[str]]:
    try:
        table = pq.read_table(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"SequenceDataset.load: {path.name} must be a Parquet file, got {error}") from error
    if ID_COLUMN not in table.column_names or (columns is not None and table.column_names != list(columns)):
        raise ValueError(f"SequenceDataset.load: {path.name} must have a column 'id', got {table.column_names}")
    for name in table.column_names:
        if not (pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type)):
            raise ValueError(f"SequenceDataset.load: {path.name} must hold text, got {table[name].type} in {name!r}")
    return {name: table[name].to_pylist() for name in table.column_names}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no manifest of this version.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"read_manifest: a data set needs {MANIFEST_FILE}, got none in {directory}; run `laser-fast prepare` first"
        )
    return Manifest.from_json(path.read_bytes())


def _load(directory: Path, verify: bool) -> SequenceDataset:
    manifest = read_manifest(directory)  # read before the seal, because older versions have a schema and no seal
    sealed = SealedFolder(directory)
    if verify:
        for name in (MANIFEST_FILE, *DATA_FILES):
            sealed.file(name)
    columns = _read_table(directory / ITEMS_FILE, None)
    users = _read_table(directory / USERS_FILE, [ID_COLUMN])
    items = ItemTable(columns.pop(ID_COLUMN), columns)
    return SequenceDataset(items, users[ID_COLUMN], *mapped_arrays(directory), manifest)


def mapped_arrays(directory: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`offsets`, `item_index` and `timestamps` of a data set's folder, mapped into memory, read-only."""
    offsets, item_index, timestamps = (
        np.asarray(np.load(directory / name, mmap_mode="r", allow_pickle=False)) for name in ARRAY_FILES
    )
    return offsets, item_index, timestamps


def check_target(directory: Path, overwrite: bool) -> None:
    """Refuse a target that holds something: `overwrite` replaces a data set, never any other folder.

    Raises:
        FileExistsError: the target is a file, a folder that is no data set, or a data set without `overwrite`.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"write_dataset: the target must be a folder, got the file {directory}")
    if not any(directory.iterdir()):
        return
    if not (directory / MANIFEST_FILE).is_file():
        raise FileExistsError(f"write_dataset: the target must be empty or a data set, got other files in {directory}")
    if not overwrite:
        raise FileExistsError(f"write_dataset: the target must be empty, got a data set in {directory}; use overwrite")


def write_dataset(
    directory: str | os.PathLike[str], dataset: SequenceDataset, *, overwrite: bool = False
) -> SequenceDataset:
    """Write a data set atomically: everything goes to a folder beside the target, which is then renamed.

    Args:
        directory: the target, missing or empty unless `overwrite` replaces a data set; parents are created.
        dataset: what to write; `counts` and `dataset_hash` of its manifest are filled in.
        overwrite: replace a data set that is already there.

    Returns:
        The data set as loaded from the target.

    Raises:
        FileExistsError: see `check_target`.
    """
    target = Path(directory).resolve()
    check_target(target, overwrite)
    with replace_directory(target) as partial:
        arrays = (dataset.offsets, dataset.item_index, dataset.timestamps)
        for name, array in zip(ARRAY_FILES, arrays, strict=True):
            np.save(partial / name, array, allow_pickle=False)
        write_around_arrays(partial, dataset)
    return SequenceDataset.load(target, verify=False)


def write_around_arrays(directory: Path, dataset: SequenceDataset) -> None:
    """Complete a folder that has the three arrays of `dataset` already: ids, texts, manifest and seal."""
    columns = {ID_COLUMN: dataset.items.ids, **dataset.items.fields}
    pq.write_table(
        pa.table({name: pa.array(column, pa.large_string()) for name, column in columns.items()}),
        directory / ITEMS_FILE,
    )
    pq.write_table(pa.table({ID_COLUMN: pa.array(dataset.user_ids, pa.large_string())}), directory / USERS_FILE)
    manifest = replace(
        dataset.manifest,
        counts={
            **dataset.manifest.counts,
            "users": dataset.num_users,
            "items": dataset.num_items,
            "interactions": len(dataset.item_index),
        },
        dataset_hash=dataset.hash(),
    )
    (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    seal(directory)
