"""Data that come split: rows of `user`, `history` and `target` for training, validation and test, as JSON lines.

A folder holds `train`, and `valid` and `test` where there are such rows, each `.jsonl` or `.jsonl.gz`, and `items` in
any format of an item file. What is made of it is a data set like any other: training rows that continue each other are
joined to sequences, every held-out row becomes a sequence of its own, and the manifest counts how many each part has.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from laser_fast.data.dataset import MANIFEST_FILE, SequenceDataset, check_target, read_manifest, write_dataset
from laser_fast.data.items import ItemTable
from laser_fast.data.manifest import Manifest, SourceFile
from laser_fast.data.preparation.order import FILE_ORDER
from laser_fast.data.readers.bad_rows import BadRowError, BadRows
from laser_fast.data.readers.item_rows import default_text_columns, read_items
from laser_fast.data.readers.rows import Row, read_rows
from laser_fast.data.readers.values import parse_id
from laser_fast.data.splits.split import Split, cut_split, parts_hash
from laser_fast.data.text import clean_text
from laser_fast.files.atomic import remove_leftovers
from laser_fast.files.locks import claim
from laser_fast.files.sealed import file_sha256

_LOGGER = logging.getLogger(__name__)
_PARTS = ("train", "valid", "test")
_ROW_SUFFIXES = (".jsonl", ".jsonl.gz")
_ITEM_SUFFIXES = (*_ROW_SUFFIXES, ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_COLUMNS = ("user", "history", "target")
_FORMAT = "presplit"


@dataclass(frozen=True)
class _Rows:
    """Rows of one part: the user's external id, item indices of history and target."""

    users: list[str]
    sequences: list[list[int]]  # history and target together


def is_presplit(dataset: SequenceDataset) -> bool:
    """Whether the data set came split."""
    return dataset.manifest.format == _FORMAT


def given_split(dataset: SequenceDataset) -> Split:
    """The split that the source gave.

    Raises:
        ValueError: the data set did not come split, or is not the one its manifest describes.
    """
    if not is_presplit(dataset):
        raise ValueError(
            f"given_split: the data set must have come split, got format {dataset.manifest.format!r}; "
            "use `prepare --presplit`"
        )
    ends = np.cumsum([dataset.manifest.counts[f"{part}_sequences"] for part in _PARTS])
    if ends[-1] != dataset.num_users:
        raise ValueError(f"given_split: the parts must have {dataset.num_users} sequences together, got {ends[-1]}")
    lengths = np.diff(dataset.offsets)
    train, valid, test = np.split(np.arange(dataset.num_users, dtype=np.int64), ends[:-1])
    rule = f"as the source gives it, ties by {dataset.manifest.tie_rule}"
    parts = [(users, lengths[users] - 1) for users in (valid, test)]
    actual = parts_hash(dataset, rule, (train, lengths[train]), *parts)
    if dataset.manifest.split_hash not in ("", actual):
        raise ValueError(
            f"given_split: the split must have the hash of the manifest, {dataset.manifest.split_hash}, "
            f"got {actual}; prepare the data set again"
        )
    return cut_split(dataset, (train, lengths[train]), *parts, rule=rule, hash=actual)


def prepare_presplit(
    folder: Path,
    out: Path,
    *,
    item_id_column: str = "item_id",
    text_columns: tuple[str, ...] | None = None,
    clean: bool = True,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = _LOGGER.info,
) -> SequenceDataset:
    """Read a folder of split rows, write a data set, return it as loaded from disk.

    A training row continues the one before it if both are of one user and its history is what was known after that one
    (cut to the longest history of the file); such rows become one sequence. What stands in the first history of a
    sequence is learned as well.

    Args:
        folder: see the module.
        out: where the data set goes; it appears whole or not at all, and is left alone if it is up to date.
        item_id_column: of the item file.
        text_columns: columns of the item file to keep; None: all.
        clean: remove HTML and collapse white space in texts.
        skip_bad_rows: leave out rows that cannot be used, and say which; the training row after such a one begins a new
            sequence.
        overwrite: replace a data set that is already there.
        say: takes what a person wants to know, e.g. `print`.

    Raises:
        FileNotFoundError: no training rows or no item file.
        FileExistsError: the target holds something else.
        ValueError: a row is not as it should be, with file, line, column and value, no training row is left, or another
            process writes the target.
    """
    target = out.resolve()
    with claim(target):
        remove_leftovers(target)
        files = _find_files(folder)
        manifest = _manifest(files, item_id_column, text_columns, clean, skip_bad_rows)
        if _up_to_date(target, manifest, overwrite):
            say(f"{out} is up to date: same sources, same settings; nothing written")
            return SequenceDataset.load(target)
        bad_rows = BadRows(skip=skip_bad_rows)
        ids, fields = read_items(files["items"], item_id_column, manifest.options["text_columns"], bad_rows=bad_rows)
        if clean:
            fields = {name: [clean_text(text) for text in column] for name, column in fields.items()}
        items = ItemTable(ids, fields)
        parts = {part: _read_part(files.get(part), items, bad_rows) for part in _PARTS}
        if bad_rows.total:
            say(bad_rows.describe())
        if not parts["train"].users:
            raise ValueError(f"prepare_presplit: at least one training row must be left, got {bad_rows.total} bad rows")
        parts["train"] = _joined(parts["train"])
        manifest = replace(manifest, counts=bad_rows.counts())
        dataset = write_dataset(target, _assemble(parts, items, manifest), overwrite=overwrite)
        counts = given_split(dataset).counts()
        say(f"{folder.name}: {len(items):,} items, " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
        say(f"wrote {out}")
        return dataset


def _find_files(folder: Path) -> dict[str, Path]:
    """The files of the parts there are, then that of the items."""
    wanted = {**dict.fromkeys(_PARTS, _ROW_SUFFIXES), "items": _ITEM_SUFFIXES}
    found: dict[str, Path] = {}
    for name, suffixes in wanted.items():
        path = next((path for suffix in suffixes if (path := folder / (name + suffix)).is_file()), None)
        if path is not None:
            found[name] = path
        elif name in ("train", "items"):
            raise FileNotFoundError(f"prepare_presplit: the folder must hold {name}.jsonl, got none in {folder}")
    return found


def _manifest(
    files: dict[str, Path], item_id_column: str, text_columns: tuple[str, ...] | None, clean: bool, skip_bad_rows: bool
) -> Manifest:
    columns = list(text_columns or ())
    if text_columns is None:
        columns = default_text_columns(files["items"], item_id_column)
    options = {"item_id_column": item_id_column, "text_columns": columns, "clean": clean}
    return Manifest(
        format=_FORMAT,
        tie_rule=FILE_ORDER,
        sources=tuple(SourceFile(path.name, file_sha256(path), path.stat().st_size) for path in files.values()),
        options=options | ({"skip_bad_rows": True} if skip_bad_rows else {}),
    )


def _up_to_date(target: Path, manifest: Manifest, overwrite: bool) -> bool:
    if not (target / MANIFEST_FILE).is_file():
        check_target(target, overwrite)
        return False
    if overwrite:
        return False
    if read_manifest(target).recipe() != manifest.recipe():
        raise FileExistsError(
            f"prepare_presplit: the target must be empty, got a data set in {target} made of other files or with other "
            "settings; use overwrite"
        )
    return True


def _read_part(path: Path | None, items: ItemTable, bad_rows: BadRows) -> _Rows:
    """The rows of a file; none where there is no file."""
    rows = _Rows([], [])
    for row in () if path is None else read_rows(path, _COLUMNS, bad_rows=bad_rows):
        try:
            user, sequence = _parsed(row, items)
        except BadRowError as error:
            bad_rows.add(error)
            continue
        rows.users.append(user)
        rows.sequences.append(sequence)
    return rows


def _parsed(row: Row, items: ItemTable) -> tuple[str, list[int]]:
    """The user's id and the indices of history and target."""
    user, history, target = row.values
    if not isinstance(history, list):
        raise row.error("a history must be a list of item ids", "history", history)
    parsed = parse_id(row, "user", user)
    ids = [parse_id(row, "history", item) for item in history] + [parse_id(row, "target", target)]
    known = items.index_of(ids)
    if (known < 0).any():
        place = int(np.argmax(known < 0))
        column, value = ("history", history[place]) if place < len(history) else ("target", target)
        raise row.error("items must be in the item file", column, value)
    return parsed, known.tolist()


def _joined(rows: _Rows) -> _Rows:
    """Rows that continue the one before them are appended to its sequence."""
    window = max((len(sequence) - 1 for sequence in rows.sequences), default=0)
    joined = _Rows([], [])
    for user, (*history, target) in zip(rows.users, rows.sequences, strict=True):
        if history and joined.users and joined.users[-1] == user:
            known = joined.sequences[-1]
            if history == known[-min(len(known), window) :]:
                known.append(target)
                continue
        joined.users.append(user)
        joined.sequences.append([*history, target])
    return joined


def _assemble(parts: dict[str, _Rows], items: ItemTable, manifest: Manifest) -> SequenceDataset:
    users = [user for part in _PARTS for user in parts[part].users]
    repeated = {user for user, count in Counter(users).items() if count > 1}
    names = [
        f"{user}@{part}.{number}" if user in repeated else user
        for part in _PARTS
        for number, user in enumerate(parts[part].users)
    ]
    dataset = SequenceDataset.from_lists([s for part in _PARTS for s in parts[part].sequences], items, names)
    counts = manifest.counts | {f"{part}_sequences": len(parts[part].users) for part in _PARTS}
    counts["items_in_sequences"] = len(np.unique(dataset.item_index))
    dataset = replace(dataset, manifest=replace(manifest, counts=counts))
    return replace(dataset, manifest=replace(dataset.manifest, split_hash=given_split(dataset).hash))
