"""Where a request finds its log and its items: files, layouts, names of columns, how texts are finished."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from laser_fast.data.preparation.request import PrepareRequest
from laser_fast.data.readers import InteractionColumns, ItemTexts, Layout, archive_members, column_types
from laser_fast.data.readers.amazon import AMAZON, PARAGRAPHS, AmazonRelease
from laser_fast.data.readers.archives import ARCHIVE_SUFFIXES, is_archive
from laser_fast.data.readers.interactions import told_unit
from laser_fast.data.readers.item_rows import default_text_columns
from laser_fast.data.readers.layouts import RECBOLE_SUFFIXES
from laser_fast.data.readers.movielens import find_movielens
from laser_fast.data.readers.streams import Source
from laser_fast.data.time_units import TOLD, TOLD_TIMES, TimeUnit, number_in, time_unit_of

TITLE_FIELD = "title"
_YEAR_COLUMNS = ("release_year", "year")
_RECBOLE_OTHERS = (".user", ".kg", ".link", ".net", ".ent")
Fields = dict[str, list[str]]


@dataclass(frozen=True)
class PrepareSources:
    """The sources of a request, with every default filled in.

    Args:
        format: "tables", "recbole", "movielens-..." or "amazon-...".
        files: what was opened, for the manifest: an archive counts as one file.
        log, log_layout, columns: the interaction log.
        time_unit: of its times, as the request or the publisher says; with a time window also as told. None: unknown.
        items, items_layout, item_id_column, texts: the item file, if there is one.
        title_column, year_column: see `PrepareRequest`.
        finish: makes the final fields of the texts read; None: they are final.
        unused: names of files that belong to the data set and are not read.
    """

    format: str
    files: tuple[Path, ...]
    log: Source
    columns: InteractionColumns
    item_id_column: str
    log_layout: Layout | None = None
    time_unit: TimeUnit | None = None
    items: Source | None = None
    items_layout: Layout | None = None
    texts: ItemTexts = field(default_factory=lambda: ItemTexts(()))
    title_column: str | None = None
    year_column: str | None = None
    finish: Callable[[Fields], Fields] | None = None
    unused: tuple[str, ...] = ()


def find_sources(request: PrepareRequest) -> PrepareSources:
    """The sources of `request`.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a folder or archive does not hold what it should, or a column is missing, see `archive_members`; or
            a time window is not in the unit of the log's times, or that cannot be told.
    """
    sources = _named_sources(request)
    if request.from_time is None and request.to_time is None:
        return sources
    return replace(sources, time_unit=_checked_unit(request, sources))


def _checked_unit(request: PrepareRequest, sources: PrepareSources) -> TimeUnit | None:
    """The unit of the log's times, for the ends of a time window: one in another unit would keep or drop everything."""
    name, stated = sources.log.name, sources.time_unit
    told = told_unit(sources.log, sources.columns.time, sources.log_layout)
    if stated and told and stated != told:
        raise ValueError(
            f"prepare: the times of {name} must be in {stated}, got times in {told}; say --time-unit {told}"
        )
    if told is None and stated is None and request.has_dates:
        asked = [text for text in (request.from_time, request.to_time) if text is not None]
        raise ValueError(
            f"prepare: a date needs times whose unit is known, got {' and '.join(asked)} and {name} without {TOLD}; "
            "say --time-unit, or give numbers"
        )
    for text in (request.from_time, request.to_time):
        number = None if text is None else number_in(text)
        if told and number and (time_unit_of(number) not in (None, told) or 0 < number < TOLD_TIMES[told][0]):
            raise ValueError(
                f"prepare: the time window must be in {told} like the times of {name}, got {text}; give a date like "
                "2015-12-31"
            )
    return told or stated


def _named_sources(request: PrepareRequest) -> PrepareSources:
    if request.movielens is not None:
        return _movielens(request, request.movielens)
    if request.recbole is not None:
        return _recbole(request, request.recbole)
    for release, pair in (("2018", request.amazon_2018), ("2023", request.amazon_2023)):
        if pair is not None:
            return _amazon(request, release, *map(_file, pair))  # type: ignore[arg-type]
    assert request.interactions is not None  # checked by the request
    log = _file(request.interactions)
    items = None if request.items is None else _file(request.items)
    return _tables(request, log, items, request.title_column, request.year_column)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"prepare: the source must be a file, got {path}")
    return path


def _files_in(path: Path, request: PrepareRequest, what: str) -> tuple[list[Source], tuple[Path, ...]]:
    """Files of a folder or archive; of an archive also the one file to be recorded."""
    if path.is_dir():
        return [file for file in sorted(path.iterdir()) if file.is_file()], ()
    if not path.is_file() or not is_archive(path):
        raise FileNotFoundError(
            f"prepare: the {what} source must be a folder or an archive ({', '.join(ARCHIVE_SUFFIXES)}), got {path}"
        )
    return list(archive_members(path, request.max_unpacked_bytes)), (path,)


def _recorded(archive: tuple[Path, ...], used: Sequence[Source | None]) -> tuple[Path, ...]:
    return archive or tuple(file for file in used if isinstance(file, Path))


def _movielens(request: PrepareRequest, path: Path) -> PrepareSources:
    files, archive = _files_in(path, request, "MovieLens")
    release = find_movielens(files, path.name)
    return PrepareSources(
        format=f"movielens-{release.name}",
        files=_recorded(archive, (release.log, release.items)),
        log=release.log,
        columns=release.columns,
        item_id_column=release.item_id,
        log_layout=release.log_layout,
        time_unit=request.time_unit or "s",
        items=release.items,
        items_layout=release.items_layout,
        texts=ItemTexts(release.texts),
        finish=partial(_chosen, release.finish, request.text_columns),
    )


def _chosen(finish: Callable[[Fields], Fields], names: Sequence[str] | None, fields: Fields) -> Fields:
    finished = finish(fields)
    for name in names or ():
        if name not in finished:
            raise ValueError(f"prepare: unknown text column, got {name!r}; available: {', '.join(finished)}")
    return {name: finished[name] for name in (finished if names is None else names)}


def _amazon(request: PrepareRequest, release: AmazonRelease, reviews: Path, metadata: Path) -> PrepareSources:
    known = AMAZON[release]
    wanted = {name: known.fields.get(name, name) for name in request.text_columns or known.fields}
    if request.text_columns is not None:  # `store` and `brand` both ask for the field "brand"
        names = {key: name for name, key in known.fields.items()}
        wanted = {names.get(key, name): key for name, key in wanted.items()}
    log_names = (known.reviews.user, known.reviews.item, known.reviews.time, known.reviews.rating)
    return PrepareSources(
        format=f"amazon-{release}",
        files=(reviews, metadata),
        log=reviews,
        columns=known.reviews,
        item_id_column=known.item_id,
        log_layout=Layout("json", columns=log_names),
        time_unit=request.time_unit or known.time_unit,
        items=metadata,
        items_layout=Layout("json", columns=(known.item_id, *wanted.values())),
        texts=ItemTexts(tuple(wanted.values()), PARAGRAPHS, repeated="first"),
        finish=lambda fields: {name: fields[key] for name, key in wanted.items()},
    )


def _recbole(request: PrepareRequest, path: Path) -> PrepareSources:
    files, archive = _files_in(path, request, "RecBole")
    logs, items = ([file for file in files if file.name.endswith(end)] for end in RECBOLE_SUFFIXES[:2])
    if len(logs) != 1 or len(items) > 1:
        names = [file.name for file in (*logs, *items)]
        raise ValueError(f"prepare: a RecBole folder must hold one .inter and at most one .item file, got {names}")
    _check_types(logs[0], request)
    item_file = items[0] if items else None
    title, year = request.title_column, request.year_column
    if item_file is not None:
        types = column_types(item_file)
        title = title or next((name for name, kind in types.items() if kind == "token_seq" and "title" in name), None)
        year = year or next((name for name in _YEAR_COLUMNS if name in types and title is not None), None)
    found = _tables(request, logs[0], item_file, title, year)
    unused = tuple(file.name for file in files if file.name.endswith(_RECBOLE_OTHERS))
    return PrepareSources(
        **{**vars(found), "format": "recbole", "files": _recorded(archive, (logs[0], item_file)), "unused": unused}
    )


def _check_types(log: Source, request: PrepareRequest) -> None:
    """Ids are single tokens, times and ratings single numbers: a list of any kind is another sort of file."""
    names, types = request.columns, column_types(log)
    numbers = ("float", "token")
    wanted = {names.user: ("token",), names.item: ("token",), names.time: numbers, names.rating: numbers}
    for column, kinds in wanted.items():
        if types.get(column, kinds[0]) not in kinds:
            raise ValueError(
                f"{log.name}: the column {column!r} must be declared as {' or '.join(kinds)}, got {types[column]}"
            )


def _tables(
    request: PrepareRequest, log: Source, items: Source | None, title: str | None, year: str | None
) -> PrepareSources:
    id_column = request.item_id_column or request.columns.item
    unit = request.time_unit
    if items is None:
        if asked := request.text_columns or request.title_column:
            raise ValueError(f"prepare: text columns need an item file, got {asked!r} and none")
        return PrepareSources("tables", _recorded((), (log,)), log, request.columns, id_column, time_unit=unit)
    texts = list(request.text_columns or ())
    if request.text_columns is None:
        texts = default_text_columns(items, id_column)
    needed = [name for name in (title, year) if name is not None and name not in texts]
    if title not in (None, TITLE_FIELD) and TITLE_FIELD in texts:
        raise ValueError(f"prepare: the field 'title' would come from two columns, got {title!r} and 'title'")
    return PrepareSources(
        format="tables",
        files=_recorded((), (log, items)),
        log=log,
        columns=request.columns,
        item_id_column=id_column,
        time_unit=unit,
        items=items,
        texts=ItemTexts((*texts, *needed)),
        title_column=title,
        year_column=year,
    )
