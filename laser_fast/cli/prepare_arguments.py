"""Arguments of `laser-fast prepare` and the request they make."""

import argparse
from pathlib import Path
from typing import get_args

from laser_fast.cli.numbers import finite_number
from laser_fast.config import resolve_path
from laser_fast.data.dataset import SequenceDataset
from laser_fast.data.preparation.order import FILE_ORDER
from laser_fast.data.preparation.prepare import Say, prepare
from laser_fast.data.preparation.presplit import prepare_presplit
from laser_fast.data.preparation.request import PrepareRequest
from laser_fast.data.readers import MAX_UNPACKED_BYTES, InteractionColumns, UnknownItems
from laser_fast.data.time_units import TimeUnit

_GB = 10**9
_PRESPLIT_OPTIONS = (
    "out",
    "presplit",
    "item_id_column",
    "text_columns",
    "no_clean",
    "skip_bad_rows",
    "no_progress",
    "overwrite",
)


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast prepare OUT SOURCE ...`; SOURCE is one of the options of `_add_sources`."""
    parser.add_argument("out", type=Path, help="folder to write the data set to")
    _add_sources(parser)
    _add_columns(parser)
    _add_filters(parser)
    parser.add_argument(
        "--tie-rule", default=FILE_ORDER, metavar="RULE", help="equal timestamps: file-order (default) or hash:SEED"
    )
    parser.add_argument("--no-clean", action="store_true", help="keep HTML and white space in texts as they are")
    parser.add_argument("--text-max-words", type=int, metavar="N", help="cut texts off after N words")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, and say which"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no bars; none are shown without a terminal")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is already there")


def _add_sources(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--recbole",
        metavar="FOLDER",
        help="RecBole atomic files, also in an archive; package:NAME/FOLDER finds a package",
    )
    source.add_argument(
        "--interactions", metavar="FILE", help="interaction log: .csv, .tsv, .jsonl, each also .gz, or .parquet"
    )
    source.add_argument("--movielens", metavar="FOLDER", help="a MovieLens release as published, folder, zip or tar")
    for year in ("2018", "2023"):
        source.add_argument(
            f"--amazon-{year}", nargs=2, metavar=("REVIEWS", "META"), help=f"Amazon Reviews {year} as published"
        )
    source.add_argument(
        "--presplit",
        metavar="FOLDER",
        help="rows of user, history and target that came split",
    )
    parser.add_argument("--items", metavar="FILE", help="item file with texts: as --interactions")
    parser.add_argument(
        "--max-archive-gb",
        type=finite_number(0, 1e9),
        default=MAX_UNPACKED_BYTES / _GB,
        metavar="GB",
        help="refuse archives that unpack to more (default: %(default).1f)",
    )


def _add_columns(parser: argparse.ArgumentParser) -> None:
    names = InteractionColumns()
    parser.add_argument("--user-column", default=names.user, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--item-column", default=names.item, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--time-column", default=names.time, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--rating-column", default=names.rating, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--item-id-column", metavar="NAME", help="id column of the item file; default: --item-column")
    parser.add_argument(
        "--text-columns", metavar="A,B,...", help="columns of the item file to keep; default: all texts"
    )
    parser.add_argument("--title-column", metavar="NAME", help="column that becomes the field 'title'")
    parser.add_argument("--year-column", metavar="NAME", help="release year, appended to film titles put right")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unknown-items", choices=get_args(UnknownItems), help="events outside the item file (default: error)"
    )
    parser.add_argument(
        "--min-rating", type=finite_number(-1e300, 1e300), metavar="R", help="leave out events rated lower"
    )
    parser.add_argument("--from-time", metavar="T", help="leave out events before: a timestamp or a date (UTC)")
    parser.add_argument("--to-time", metavar="T", help="leave out events at this time or later")
    parser.add_argument(
        "--time-unit",
        choices=get_args(TimeUnit),
        help="of the log's timestamps, for dates (default: told by their size)",
    )
    parser.add_argument(
        "--duplicates", choices=("all", "first", "last"), default="all", help="events with the same user and item"
    )
    parser.add_argument("--min-user-interactions", type=int, default=1, metavar="N", help="leave out shorter users")
    parser.add_argument("--min-item-interactions", type=int, default=1, metavar="N", help="leave out rarer items")
    parser.add_argument("--max-history", type=int, metavar="N", help="keep the newest N events of a user")
    parser.add_argument(
        "--min-history", type=int, default=1, metavar="N", help="leave out users with fewer events, at last"
    )
    parser.add_argument(
        "--catalogue", choices=("all", "interacted"), help="keep items that are in no sequence (default) or not"
    )


def prepare_from_arguments(arguments: argparse.Namespace, say: Say) -> SequenceDataset:
    """`prepare`, or `prepare_presplit` where the data came split.

    Raises:
        ValueError: options that do nothing for data that came split; see the two functions.
    """
    if arguments.presplit is None:
        return prepare(request_from_arguments(arguments), say=say, progress=not arguments.no_progress)
    defaults = argparse.ArgumentParser()
    add_prepare_arguments(defaults)
    useless = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(arguments).items()
        if name in vars(defaults.parse_args(["", "--presplit", ""])) and name not in _PRESPLIT_OPTIONS
        if value != defaults.get_default(name)
    ]
    if useless:
        raise ValueError(f"prepare: options must concern data that came split, got {', '.join(useless)}")
    names = InteractionColumns()
    return prepare_presplit(
        resolve_path(arguments.presplit),
        arguments.out,
        item_id_column=arguments.item_id_column or names.item,
        text_columns=_names(arguments.text_columns),
        clean=not arguments.no_clean,
        skip_bad_rows=arguments.skip_bad_rows,
        overwrite=arguments.overwrite,
        say=say,
    )


def _names(texts: str | None) -> tuple[str, ...] | None:
    return None if texts is None else tuple(name.strip() for name in texts.split(",") if name.strip())


def request_from_arguments(arguments: argparse.Namespace) -> PrepareRequest:
    """The request of parsed arguments; sources may be `package:NAME/PATH`.

    Raises:
        ValueError, FileNotFoundError: see `PrepareRequest` and `resolve_path`.
    """

    def resolved(source: str | None) -> Path | None:
        return None if source is None else resolve_path(source)

    def pair(sources: list[str] | None) -> tuple[Path, Path] | None:
        return None if sources is None else (resolve_path(sources[0]), resolve_path(sources[1]))

    return PrepareRequest(
        out=arguments.out,
        recbole=resolved(arguments.recbole),
        interactions=resolved(arguments.interactions),
        items=resolved(arguments.items),
        movielens=resolved(arguments.movielens),
        amazon_2018=pair(arguments.amazon_2018),
        amazon_2023=pair(arguments.amazon_2023),
        columns=InteractionColumns(
            arguments.user_column, arguments.item_column, arguments.time_column, arguments.rating_column
        ),
        item_id_column=arguments.item_id_column,
        text_columns=_names(arguments.text_columns),
        title_column=arguments.title_column,
        year_column=arguments.year_column,
        tie_rule=arguments.tie_rule,
        unknown_items=arguments.unknown_items,
        min_rating=arguments.min_rating,
        from_time=arguments.from_time,
        to_time=arguments.to_time,
        time_unit=arguments.time_unit,
        duplicates=arguments.duplicates,
        min_user_interactions=arguments.min_user_interactions,
        min_item_interactions=arguments.min_item_interactions,
        max_history=arguments.max_history,
        min_history=arguments.min_history,
        catalogue=arguments.catalogue,
        clean=not arguments.no_clean,
        text_max_words=arguments.text_max_words,
        skip_bad_rows=arguments.skip_bad_rows,
        max_unpacked_bytes=round(arguments.max_archive_gb * _GB),
        overwrite=arguments.overwrite,
    )
