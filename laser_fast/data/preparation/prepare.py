"""From source files to a data set on disk: read, clean, filter, order, write. The command `laser-fast prepare`."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from laser_fast.data.dataset import (
    MANIFEST_FILE,
    SequenceDataset,
    check_target,
    mapped_arrays,
    read_manifest,
    write_around_arrays,
)
from laser_fast.data.items import ItemTable
from laser_fast.data.manifest import Manifest, SourceFile
from laser_fast.data.preparation.events import Log, events_of, order_and_filter, read_log, write_arrays
from laser_fast.data.preparation.order import tie_counts
from laser_fast.data.preparation.progress import ordering_bar, reading_bar
from laser_fast.data.preparation.request import PrepareRequest
from laser_fast.data.preparation.sources import TITLE_FIELD, Fields, PrepareSources, find_sources
from laser_fast.data.preparation.titles import normalize_title
from laser_fast.data.readers import BadRows, read_items
from laser_fast.data.readers.bad_rows import BAD_ROWS
from laser_fast.data.readers.interactions import BUFFER_EVENTS
from laser_fast.data.splits.split import leave_one_out_rule, split_hash
from laser_fast.data.text import clean_text, first_words
from laser_fast.files.atomic import remove_leftovers, replace_directory, scratch_directory
from laser_fast.files.locks import claim
from laser_fast.files.sealed import file_sha256

_LOGGER = logging.getLogger(__name__)

Say = Callable[[str], None]


def _manifest(request: PrepareRequest, sources: PrepareSources) -> Manifest:
    """How the data set is made; what is not asked for is not mentioned, so that later versions change no recipe."""
    start, end = request.window(sources.time_unit or "s")
    asked: dict[str, Any] = {
        "from_time": start,
        "to_time": end,
        "time_unit": sources.time_unit if request.has_dates else None,
        "duplicates": None if request.duplicates == "all" else request.duplicates,
        "max_history": request.max_history,
        "min_history": None if request.min_history == 1 else request.min_history,
    }
    asked_of_texts = {"text_max_words": request.text_max_words, "skip_bad_rows": request.skip_bad_rows or None}
    return Manifest(
        format=sources.format,
        tie_rule=request.tie_rule,
        sources=tuple(SourceFile(path.name, file_sha256(path), path.stat().st_size) for path in sources.files),
        filters={
            "min_rating": request.min_rating,
            "min_user_interactions": request.min_user_interactions,
            "min_item_interactions": request.min_item_interactions,
            "unknown_items": request.unknown_items or ("keep" if request.amazon else "error"),
            "catalogue": request.catalogue or ("interacted" if request.amazon else "all"),
            **{name: value for name, value in asked.items() if value is not None},
        },
        options={
            "user_column": sources.columns.user,
            "item_column": sources.columns.item,
            "time_column": sources.columns.time,
            "rating_column": sources.columns.rating if request.min_rating is not None else None,
            "item_id_column": sources.item_id_column,
            "text_columns": list(sources.texts.columns),
            "title_column": sources.title_column,
            "year_column": sources.year_column,
            "clean": request.clean,
            **{name: value for name, value in asked_of_texts.items() if value is not None},
        },
    )


def _read_catalogue(
    request: PrepareRequest, sources: PrepareSources, bad_rows: BadRows
) -> tuple[list[str] | None, Fields]:
    """External ids and finished text fields of the item file, the title first, if there is one; None without a file."""
    if sources.items is None:
        return None, {}
    layout = sources.items_layout
    ids, fields = read_items(sources.items, sources.item_id_column, sources.texts, layout=layout, bad_rows=bad_rows)
    if sources.finish is not None:
        fields = sources.finish(fields)
    if request.clean:
        fields = {name: [clean_text(text) for text in column] for name, column in fields.items()}
    if sources.title_column is not None:
        fields = _with_title(request, sources, sources.title_column, fields)
    if (longest := request.text_max_words) is not None:
        fields = {name: [first_words(text, longest) for text in column] for name, column in fields.items()}
    return ids, fields


def _with_title(request: PrepareRequest, sources: PrepareSources, title_column: str, fields: Fields) -> Fields:
    titles = fields.pop(title_column)
    if sources.year_column is not None:
        years = titles if sources.year_column == title_column else fields[sources.year_column]
        titles = [normalize_title(title, year) for title, year in zip(titles, years, strict=True)]
    asked = request.text_columns
    kept = {name: column for name, column in fields.items() if asked is None or name in asked}
    return {TITLE_FIELD: titles, **kept}


def _counts(log: Log, dataset: SequenceDataset, per_item: np.ndarray, bad_rows: BadRows) -> dict[str, int]:
    counts = {"items_in_sequences": int((per_item > 0).sum()), **tie_counts(dataset.offsets, dataset.timestamps)}
    counts |= {f"dropped_{reason}": count for reason, count in log.ids.dropped.items()}
    if bad_rows.repeated_items:
        counts["repeated_items"] = bad_rows.repeated_items
    return counts | bad_rows.counts()


def _write(directory: Path, log: Log, fields: Fields, manifest: Manifest, bad_rows: BadRows) -> None:
    """Write the data set into an empty folder; what is written is mapped, checked, counted and hashed from there."""
    item_ids, user_ids = log.ids.item_ids, log.ids.user_ids
    per_user, per_item = events_of(log)
    present = np.flatnonzero(per_user)  # the filters may have emptied a user
    offsets = np.zeros(len(present) + 1, dtype=np.int64)
    np.cumsum(per_user[present], out=offsets[1:])
    kept = np.flatnonzero(per_item) if manifest.filters["catalogue"] == "interacted" else np.arange(len(item_ids))
    renumbered = np.full(len(item_ids), -1, dtype=np.int64)
    renumbered[kept] = np.arange(len(kept))
    write_arrays(directory, log, offsets, renumbered)
    padded = {name: column + [""] * (len(item_ids) - len(column)) for name, column in fields.items()}
    texts = {name: [column[index] for index in kept] for name, column in padded.items()}
    items = ItemTable([item_ids[index] for index in kept], texts)
    users = [user_ids[user] for user in present]
    dataset = SequenceDataset(items, users, *mapped_arrays(directory), manifest)
    manifest = replace(
        manifest,
        counts=_counts(log, dataset, per_item, bad_rows),
        split_hash=split_hash(dataset, leave_one_out_rule(manifest.tie_rule)),
    )
    write_around_arrays(directory, replace(dataset, manifest=manifest))


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
    """Counts of a data set and what its tie rule decides, in a few lines."""
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
    if counts.get(BAD_ROWS):
        lines.append(f"bad rows skipped: {counts[BAD_ROWS]:,}")
    filters = dataset.manifest.filters
    if "time_unit" in filters:
        window = [f"{name} {filters[name]}" for name in ("from_time", "to_time") if name in filters]
        lines.append(f"the times of the log are taken for {filters['time_unit']}: {', '.join(window)}")
    return "\n".join(lines)


def prepare(
    request: PrepareRequest, say: Say = _LOGGER.info, *, progress: bool = False, buffer_events: int = BUFFER_EVENTS
) -> SequenceDataset:
    """Read the sources, write the data set, return it as loaded from disk.

    The target appears whole or not at all, also when the process is killed; what a killed one left is removed by the
    next. If the target is there already and was made from the same files with the same settings, nothing is done.
    Items keep the order of the item file, users that of their first event.

    Memory does not grow with the events of a log, but with its items and the ids of its users: events wait in files
    beside the target, 32 bytes each, while they are ordered.

    Args:
        request: what to do.
        say: takes what a person wants to know, e.g. `print`.
        progress: show bars for reading and ordering, if the standard error is a terminal.
        buffer_events: most events in memory at once, or those of one user if these are more; decides nothing else.

    Raises:
        FileNotFoundError: a source is missing.
        FileExistsError: the target holds something else; see `check_target`.
        ValueError: a source is not as it should be (with file, line, column and value), nothing is left to write, or
            another process writes the target.
    """
    target = request.out.resolve()
    with claim(target):
        remove_leftovers(target)
        return _prepare(request, target, say, progress=progress, buffer_events=buffer_events)


def _prepare(request: PrepareRequest, target: Path, say: Say, *, progress: bool, buffer_events: int) -> SequenceDataset:
    sources = find_sources(request)
    manifest = _manifest(request, sources)
    dataset = _existing(target, manifest, request.overwrite)
    if dataset is not None:
        say(f"{describe(dataset)}\n{request.out} is up to date: same sources, same settings; nothing written")
        return dataset
    bad_rows = BadRows(skip=request.skip_bad_rows)
    ids, fields = _read_catalogue(request, sources, bad_rows)
    with scratch_directory(target) as scratch:
        with reading_bar(sources.log, progress) as source:
            log = read_log(replace(sources, log=source), ids, manifest, bad_rows, scratch, buffer_events)
        with ordering_bar(len(log.events), progress) as ordered:
            order_and_filter(log, request, ordered)
        if bad_rows.total:
            say(bad_rows.describe())
        if not len(log.events):
            raise ValueError(f"prepare: at least one interaction must be left, got none; dropped: {log.ids.dropped}")
        check_target(target, request.overwrite)
        with replace_directory(target) as fresh:
            _write(fresh, log, fields, manifest, bad_rows)
    del log, ids, fields  # the data set has its own
    dataset = SequenceDataset.load(target, verify=False)
    unused = f"\nnot used: {', '.join(sources.unused)}" if sources.unused else ""
    say(f"{describe(dataset)}{unused}\nwrote {request.out}")
    return dataset
