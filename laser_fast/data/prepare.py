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
    file_sha256,
    read_manifest,
    write_dataset,
)
from laser_fast.data.filters import core, long_enough, newest, order_of, without_duplicates
from laser_fast.data.folders import remove_leftovers
from laser_fast.data.items import ItemTable
from laser_fast.data.manifest import Manifest, SourceFile
from laser_fast.data.order import parse_tie_rule, tie_counts
from laser_fast.data.prepare_request import PrepareRequest
from laser_fast.data.prepare_sources import TITLE_FIELD, Fields, PrepareSources, find_sources
from laser_fast.data.readers import BadRows, EventRules, Interactions, read_interactions, read_items
from laser_fast.data.split import leave_one_out_rule, split_hash
from laser_fast.data.text import clean_text, first_words
from laser_fast.data.titles import normalize_title

_LOGGER = logging.getLogger(__name__)
BAD_ROWS = "bad_rows"

Say = Callable[[str], None]


def _manifest(request: PrepareRequest, sources: PrepareSources) -> Manifest:
    """How the data set is made; what is not asked for is not mentioned, so that later versions change no recipe."""
    start, end = request.window(sources.time_unit)
    asked: dict[str, Any] = {
        "from_time": start,
        "to_time": end,
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


def _read_log(
    sources: PrepareSources, catalogue: list[str] | None, manifest: Manifest, bad_rows: BadRows
) -> Interactions:
    filters = manifest.filters
    rules = EventRules(
        filters["unknown_items"], filters["min_rating"], filters.get("from_time"), filters.get("to_time")
    )
    return read_interactions(
        sources.log, sources.columns, catalogue, rules, layout=sources.log_layout, bad_rows=bad_rows
    )


def _filtered(events: Interactions, request: PrepareRequest) -> Interactions:
    """All filters that look at the whole log, in the order in which `PrepareRequest` names them."""
    seed = parse_tie_rule(request.tie_rule)
    if request.duplicates != "all":
        events = without_duplicates(events, request.duplicates, seed)
    events = core(events, request.min_user_interactions, request.min_item_interactions)
    if request.max_history is not None:
        events = newest(events, request.max_history, seed)
    if request.min_history > 1:
        events = long_enough(events, request.min_history)
    return events


def _assemble(events: Interactions, fields: Fields, manifest: Manifest, bad_rows: BadRows) -> SequenceDataset:
    seed = parse_tie_rule(manifest.tie_rule)
    order = order_of(events, seed)
    per_user = np.bincount(events.user_index, minlength=len(events.user_ids))
    present = np.flatnonzero(per_user)  # the filters may have emptied a user
    offsets = np.zeros(len(present) + 1, dtype=np.int64)
    np.cumsum(per_user[present], out=offsets[1:])
    items = events.item_index[order]
    used = np.bincount(items, minlength=len(events.item_ids)) > 0
    kept = np.flatnonzero(used) if manifest.filters["catalogue"] == "interacted" else np.arange(len(events.item_ids))
    renumbered = np.full(len(events.item_ids), -1, dtype=np.int64)
    renumbered[kept] = np.arange(len(kept))
    timestamps = events.timestamps[order]
    padded = {name: column + [""] * (len(events.item_ids) - len(column)) for name, column in fields.items()}
    counts = {"items_in_sequences": int(used.sum()), **tie_counts(offsets, timestamps)}
    counts |= {f"dropped_{reason}": count for reason, count in events.dropped.items()}
    if bad_rows.repeated_items:
        counts["repeated_items"] = bad_rows.repeated_items
    if bad_rows.skip:
        counts |= {BAD_ROWS: bad_rows.total}
        counts |= {f"{BAD_ROWS}: {reason}": count for reason, count in bad_rows.by_reason.items()}
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
    return "\n".join(lines)


def prepare(request: PrepareRequest, say: Say = _LOGGER.info) -> SequenceDataset:
    """Read the sources, write the data set, return it as loaded from disk.

    The target appears whole or not at all, also when the process is killed; what a killed one left is removed by the
    next. If the target is there already and was made from the same files with the same settings, nothing is done.
    Items keep the order of the item file, users that of their first event.

    Args:
        request: what to do.
        say: takes what a person wants to know, e.g. `print`.

    Raises:
        FileNotFoundError: a source is missing.
        FileExistsError: the target holds something else; see `check_target`.
        ValueError: a source is not as it should be (with file, line, column and value), or nothing is left to write.
    """
    target = request.out.resolve()
    remove_leftovers(target)
    sources = find_sources(request)
    manifest = _manifest(request, sources)
    dataset = _existing(target, manifest, request.overwrite)
    if dataset is not None:
        say(f"{describe(dataset)}\n{request.out} is up to date: same sources, same settings; nothing written")
        return dataset
    bad_rows = BadRows(skip=request.skip_bad_rows)
    ids, fields = _read_catalogue(request, sources, bad_rows)
    events = _filtered(_read_log(sources, ids, manifest, bad_rows), request)
    if bad_rows.total:
        say(bad_rows.describe())
    if not len(events.user_index):
        raise ValueError(f"prepare: at least one interaction must be left, got none; dropped: {events.dropped}")
    dataset = write_dataset(target, _assemble(events, fields, manifest, bad_rows), overwrite=request.overwrite)
    unused = f"\nnot used: {', '.join(sources.unused)}" if sources.unused else ""
    say(f"{describe(dataset)}{unused}\nwrote {request.out}")
    return dataset
