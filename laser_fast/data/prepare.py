"""From source files to a data set on disk: read, clean, filter, order, write. The command `laser-fast prepare`."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from laser_fast.data.dataset import (
    MANIFEST_FILE,
    SequenceDataset,
    check_target,
    file_sha256,
    read_manifest,
    write_dataset,
)
from laser_fast.data.items import ItemTable
from laser_fast.data.manifest import Manifest, SourceFile
from laser_fast.data.order import FILE_ORDER, chronological_order, core_mask, parse_tie_rule, tie_counts, tie_keys
from laser_fast.data.readers import InteractionColumns, Interactions, UnknownItems, read_interactions, read_items
from laser_fast.data.readers.items import default_text_columns
from laser_fast.data.readers.rows import column_types
from laser_fast.data.split import leave_one_out_rule, split_hash
from laser_fast.data.text import clean_text
from laser_fast.data.titles import normalize_title

_LOGGER = logging.getLogger(__name__)
TITLE_FIELD = "title"
_YEAR_COLUMNS = ("release_year", "year")

Say = Callable[[str], None]


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare, from what, how.

    Args:
        out: folder of the data set.
        recbole: folder with RecBole atomic files: one `.inter`, at most one `.item`. Or
        interactions, items: an interaction log and an item file (CSV, TSV, JSON lines, also gzipped); without an item
            file the catalogue is the items of the log, without texts.
        columns: names of the log's columns.
        item_id_column: name of the item file's id column; None: as in the log.
        text_columns: columns of the item file to keep; None: all (of RecBole files all token columns).
        title_column: column that becomes the field "title"; None: of RecBole files the first token_seq column with
            "title" in its name, else a column "title" stays what it is.
        year_column: column with the release year, appended to the title; None: of RecBole files `release_year` or
            `year`. With a year, titles are taken for film titles and put right (`normalize_title`).
        tie_rule: order of one user's events with equal timestamps: "file-order", or "hash:SEED" (seeded hash of user
            and item id).
        unknown_items: what an event with an item outside the item file does: "error", "drop" (the event) or "keep"
            (the item, with empty texts).
        min_rating: drop events rated lower.
        min_user_interactions, min_item_interactions: drop users and items with fewer events, repeatedly.
        catalogue: "all" keeps every item of the item file, also those in no sequence; "interacted" only those in one.
        clean: remove HTML and collapse white space in texts.
        overwrite: replace a data set that is already at `out`.

    Raises:
        ValueError: not exactly one source, or a setting out of range.
    """

    out: Path
    recbole: Path | None = None
    interactions: Path | None = None
    items: Path | None = None
    columns: InteractionColumns = field(default_factory=InteractionColumns)
    item_id_column: str | None = None
    text_columns: tuple[str, ...] | None = None
    title_column: str | None = None
    year_column: str | None = None
    tie_rule: str = FILE_ORDER
    unknown_items: UnknownItems = "error"
    min_rating: float | None = None
    min_user_interactions: int = 1
    min_item_interactions: int = 1
    catalogue: Literal["all", "interacted"] = "all"
    clean: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.recbole is None) == (self.interactions is None):
            raise ValueError(
                "PrepareRequest: either a RecBole folder or an interaction log must be given, "
                f"got {self.recbole} and {self.interactions}"
            )
        if self.recbole is not None and self.items is not None:
            raise ValueError(f"PrepareRequest: a RecBole folder brings its own item file, got {self.items} too")
        if self.year_column is not None and self.title_column is None and self.recbole is None:
            raise ValueError(f"PrepareRequest: a year column needs a title column, got {self.year_column!r} alone")
        parse_tie_rule(self.tie_rule)
        for name, allowed in (("unknown_items", ("error", "drop", "keep")), ("catalogue", ("all", "interacted"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"PrepareRequest: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("min_user_interactions", "min_item_interactions"):
            if getattr(self, name) < 1:
                raise ValueError(f"PrepareRequest: {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class _Plan:
    """A request with every default filled in from the files' headers."""

    request: PrepareRequest
    interactions: Path
    items: Path | None
    item_id_column: str
    text_columns: tuple[str, ...]
    title_column: str | None
    year_column: str | None

    def manifest(self) -> Manifest:
        request = self.request
        files = [self.interactions] + ([self.items] if self.items is not None else [])
        return Manifest(
            format="tables" if request.recbole is None else "recbole",
            tie_rule=request.tie_rule,
            sources=tuple(SourceFile(path.name, file_sha256(path), path.stat().st_size) for path in files),
            filters={
                "min_rating": request.min_rating,
                "min_user_interactions": request.min_user_interactions,
                "min_item_interactions": request.min_item_interactions,
                "unknown_items": request.unknown_items,
                "catalogue": request.catalogue,
            },
            options={
                "user_column": request.columns.user,
                "item_column": request.columns.item,
                "time_column": request.columns.time,
                "rating_column": request.columns.rating if request.min_rating is not None else None,
                "item_id_column": self.item_id_column,
                "text_columns": list(self.text_columns),
                "title_column": self.title_column,
                "year_column": self.year_column,
                "clean": request.clean,
            },
        )


def _recbole_files(folder: Path) -> tuple[Path, Path | None]:
    if not folder.is_dir():
        raise FileNotFoundError(f"prepare: the RecBole source must be a folder, got {folder}")
    logs, items = (sorted(path for path in folder.iterdir() if path.suffix == end) for end in (".inter", ".item"))
    if len(logs) != 1 or len(items) > 1:
        names = [path.name for path in (*logs, *items)]
        raise ValueError(f"prepare: a RecBole folder must hold one .inter and at most one .item file, got {names}")
    return logs[0], items[0] if items else None


def _plan(request: PrepareRequest) -> _Plan:
    if request.recbole is not None:
        interactions, items = _recbole_files(request.recbole)
    else:
        assert request.interactions is not None  # checked by the request
        interactions, items = request.interactions, request.items
    for path in (interactions, items):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"prepare: the source must be a file, got {path}")
    id_column = request.item_id_column or request.columns.item
    if items is None:
        if asked := request.text_columns or request.title_column:
            raise ValueError(f"prepare: text columns need an item file, got {asked!r} and none")
        return _Plan(request, interactions, None, id_column, (), None, None)
    title, year = request.title_column, request.year_column
    types = column_types(items)
    if request.recbole is not None:
        title = title or next((name for name, kind in types.items() if kind == "token_seq" and "title" in name), None)
        year = year or next((name for name in _YEAR_COLUMNS if name in types and title is not None), None)
    texts = default_text_columns(items, id_column) if request.text_columns is None else list(request.text_columns)
    needed = [name for name in (title, year) if name is not None and name not in texts]
    if title not in (None, TITLE_FIELD) and TITLE_FIELD in texts:
        raise ValueError(f"prepare: the field 'title' would come from two columns, got {title!r} and 'title'")
    return _Plan(request, interactions, items, id_column, (*texts, *needed), title, year)


def _read_catalogue(plan: _Plan) -> tuple[list[str], dict[str, list[str]]]:
    """External ids and finished text fields of the item file; the title first, if there is one."""
    assert plan.items is not None
    ids, fields = read_items(plan.items, plan.item_id_column, plan.text_columns)
    if plan.request.clean:
        fields = {name: [clean_text(text) for text in column] for name, column in fields.items()}
    if plan.title_column is None:
        return ids, fields
    titles = fields.pop(plan.title_column)
    if plan.year_column is not None:
        titles = [normalize_title(title, year) for title, year in zip(titles, fields[plan.year_column], strict=True)]
    asked = plan.request.text_columns
    kept = {name: column for name, column in fields.items() if asked is None or name in asked}
    return ids, {TITLE_FIELD: titles, **kept}


def _filtered(events: Interactions, request: PrepareRequest) -> Interactions:
    keep = core_mask(events.user_index, events.item_index, request.min_user_interactions, request.min_item_interactions)
    return replace(
        events,
        user_index=events.user_index[keep],
        item_index=events.item_index[keep],
        timestamps=events.timestamps[keep],
        dropped={**events.dropped, "core": int((~keep).sum())},
    )


def _assemble(
    events: Interactions, fields: dict[str, list[str]], manifest: Manifest, catalogue: str
) -> SequenceDataset:
    seed = parse_tie_rule(manifest.tie_rule)
    ids = (events.user_ids, events.item_ids, events.user_index, events.item_index)
    order = chronological_order(events.user_index, events.timestamps, None if seed is None else tie_keys(*ids, seed))
    per_user = np.bincount(events.user_index, minlength=len(events.user_ids))
    present = np.flatnonzero(per_user)  # the filters may have emptied a user
    offsets = np.zeros(len(present) + 1, dtype=np.int64)
    np.cumsum(per_user[present], out=offsets[1:])
    items = events.item_index[order]
    used = np.bincount(items, minlength=len(events.item_ids)) > 0
    kept = np.flatnonzero(used) if catalogue == "interacted" else np.arange(len(events.item_ids))
    renumbered = np.full(len(events.item_ids), -1, dtype=np.int64)
    renumbered[kept] = np.arange(len(kept))
    timestamps = events.timestamps[order]
    padded = {name: column + [""] * (len(events.item_ids) - len(column)) for name, column in fields.items()}
    counts = {"items_in_sequences": int(used.sum()), **tie_counts(offsets, timestamps)}
    counts |= {f"dropped_{reason}": count for reason, count in events.dropped.items()}
    dataset = SequenceDataset(
        items=ItemTable(
            [events.item_ids[index] for index in kept],
            {name: [column[index] for index in kept] for name, column in padded.items()},
        ),
        user_ids=[events.user_ids[user] for user in present],
        offsets=offsets,
        item_index=renumbered[items].astype(np.int32),
        timestamps=timestamps,
        manifest=replace(manifest, counts=counts),
    )
    split = split_hash(dataset, leave_one_out_rule(manifest.tie_rule))
    return replace(dataset, manifest=replace(dataset.manifest, split_hash=split))


def _existing(target: Path, manifest: Manifest, overwrite: bool) -> SequenceDataset | None:
    """The data set at the target if it was made by the same recipe and is whole; None if it has to be written."""
    if not (target / MANIFEST_FILE).is_file():
        check_target(target, overwrite)
        return None
    try:
        recipe = read_manifest(target).recipe()
        wanted = manifest.recipe()
        if recipe == wanted:
            return SequenceDataset.load(target)
        differing = [name for name in wanted if recipe[name] != wanted[name]]
        reason = f"it was prepared with other {', '.join(differing)}"
    except (ValueError, TypeError, FileNotFoundError) as error:
        reason = f"it is damaged ({error})"
    if not overwrite:
        raise FileExistsError(
            f"prepare: the target must be empty, got a data set in {target} and {reason}; use overwrite"
        )
    return None


def describe(dataset: SequenceDataset) -> str:
    """Sources, counts and tie rule of a prepared data set, for a person."""
    counts = dataset.manifest.counts
    sources = ", ".join(source.name for source in dataset.manifest.sources) or dataset.manifest.format
    lines = [
        f"{sources}: {counts['users']:,} users, {counts['items']:,} items "
        f"({counts['items_in_sequences']:,} in sequences), {counts['interactions']:,} interactions",
        f"ties by {dataset.manifest.tie_rule}: {counts['tied_interactions']:,} interactions share their time with "
        f"another of the same user, the last two of {counts['users_with_last_two_tied']:,} users tie",
    ]
    if dropped := [f"{count:,} {name[8:]}" for name, count in counts.items() if name.startswith("dropped_") and count]:
        lines.append(f"left out: {', '.join(dropped)}")
    return "\n".join(lines)


def prepare(request: PrepareRequest, say: Say = _LOGGER.info) -> SequenceDataset:
    """Read the sources, write the data set, return it as loaded from disk.

    The target appears whole or not at all. If it is there already and was made from the same files with the same
    settings, nothing is done. Items keep the order of the item file, users that of their first event.

    Args:
        request: what to do.
        say: takes what a person wants to know, e.g. `print`.

    Raises:
        FileNotFoundError: a source is missing.
        FileExistsError: the target holds something else; see `check_target`.
        ValueError: a source is not as it should be (with file, line, column and value), or nothing is left to write.
    """
    target = request.out.resolve()
    plan = _plan(request)
    manifest = plan.manifest()
    dataset = _existing(target, manifest, request.overwrite)
    if dataset is not None:
        say(f"{describe(dataset)}\n{request.out} is up to date: same sources, same settings; nothing written")
        return dataset
    ids, fields = (None, {}) if plan.items is None else _read_catalogue(plan)
    events = read_interactions(
        plan.interactions,
        request.columns,
        ids,
        unknown_items=request.unknown_items,
        min_rating=request.min_rating,
    )
    events = _filtered(events, request)
    if not len(events.user_index):
        raise ValueError(f"prepare: at least one interaction must be left, got none; dropped: {events.dropped}")
    dataset = write_dataset(target, _assemble(events, fields, manifest, request.catalogue), overwrite=request.overwrite)
    say(f"{describe(dataset)}\nwrote {request.out}")
    return dataset
