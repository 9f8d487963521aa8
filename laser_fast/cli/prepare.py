"""`laser-fast prepare`: a data set from interaction logs and item files, or from data that came split."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from laser_fast.cli.arguments import finite_number
from laser_fast.config import resolve_path
from laser_fast.data import InteractionColumns, PrepareRequest, prepare, prepare_presplit
from laser_fast.data.preparation.order import FILE_ORDER
from laser_fast.data.readers import MAX_UNPACKED_BYTES, UnknownItems
from laser_fast.data.time_units import TimeUnit

_GB = 10**9
_SOURCES = ("recbole", "interactions", "movielens", "items", "amazon_2018", "amazon_2023")
_PRESPLIT = ("out", "presplit", "item_id_column", "text_columns", "clean", "skip_bad_rows", "no_progress", "overwrite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast prepare OUT SOURCE ...`."""
    parser.add_argument("out", type=Path, help="folder to write the data set to")
    _add_sources(parser)
    _add_filters(parser)
    ties = "order of equal timestamps: file-order (default) or hash:SEED"
    parser.add_argument("--tie-rule", default=FILE_ORDER, metavar="RULE", help=ties)
    parser.add_argument("--no-clean", dest="clean", action="store_false", help="keep HTML and white space in texts")
    parser.add_argument("--text-max-words", type=int, metavar="N", help="cut texts off after N words")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out unusable rows, and say which")
    parser.add_argument("--no-progress", action="store_true", help="show no bars; none are shown without a terminal")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is already there")


def _add_sources(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    for name, metavar, text in (
        ("recbole", "FOLDER", "RecBole atomic files, also in an archive; package:NAME/FOLDER finds a package"),
        ("interactions", "FILE", "interaction log: .csv, .tsv, .jsonl, each also .gz, or .parquet"),
        ("movielens", "FOLDER", "a MovieLens release as published, folder, zip or tar"),
    ):
        source.add_argument(f"--{name}", metavar=metavar, help=text)
    for year in ("2018", "2023"):
        text, pair = f"Amazon Reviews {year} as published", ("REVIEWS", "META")
        source.add_argument(f"--amazon-{year}", nargs=2, metavar=pair, help=text)
    source.add_argument("--presplit", metavar="FOLDER", help="rows of user, history and target that came split")
    parser.add_argument("--items", metavar="FILE", help="item file with texts: as --interactions")
    most = "refuse archives that unpack to more (default: %(default).1f)"
    size, default = finite_number(0, 1e9), MAX_UNPACKED_BYTES / _GB
    parser.add_argument("--max-archive-gb", type=size, default=default, metavar="GB", help=most)
    for column in fields(InteractionColumns):
        option = f"--{column.name}-column"
        parser.add_argument(option, default=column.default, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--item-id-column", metavar="NAME", help="id column of the item file; default: --item-column")
    parser.add_argument("--text-columns", type=_names, metavar="A,B,...", help="of the item file; default: all")
    parser.add_argument("--title-column", metavar="NAME", help="column that becomes the field 'title'")
    parser.add_argument("--year-column", metavar="NAME", help="release year: 'Matrix, The' becomes 'The Matrix (1999)'")


def _names(texts: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in texts.split(",") if name.strip())


def _add_filters(parser: argparse.ArgumentParser) -> None:
    unknown = "events outside the item file (default: error)"
    parser.add_argument("--unknown-items", choices=get_args(UnknownItems), help=unknown)
    lower = "leave out events rated lower"
    parser.add_argument("--min-rating", type=finite_number(-1e300, 1e300), metavar="R", help=lower)
    parser.add_argument("--from-time", metavar="T", help="leave out events before: a timestamp or a date (UTC)")
    parser.add_argument("--to-time", metavar="T", help="leave out events at this time or later")
    unit = "of the log's timestamps, for dates (default: by their size)"
    parser.add_argument("--time-unit", choices=get_args(TimeUnit), help=unit)
    parser.add_argument("--duplicates", choices=("all", "first", "last"), default="all", help="of one user and item")
    for name, default, text in (
        ("--min-user-interactions", 1, "leave out shorter users"),
        ("--min-item-interactions", 1, "leave out rarer items"),
        ("--max-history", None, "keep the newest N events of a user"),
        ("--min-history", 1, "leave out users with fewer events in the end"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=text)
    catalogue = "keep items that are in no sequence (default) or not"
    parser.add_argument("--catalogue", choices=("all", "interacted"), help=catalogue)


def run(parsed: argparse.Namespace) -> None:
    """Prepare a data set; of data that came split, refuse the options that do nothing."""
    if parsed.presplit is None:
        prepare(request_of(parsed), say=print, progress=not parsed.no_progress)
        return
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    useless = [
        f"--{name.replace('_', '-')}"
        for name, default in vars(parser.parse_args(["", "--presplit", ""])).items()
        if name not in _PRESPLIT and getattr(parsed, name) != default
    ]
    if useless:
        raise ValueError(f"prepare: options must concern data that came split, got {', '.join(useless)}")
    prepare_presplit(
        resolve_path(parsed.presplit),
        parsed.out,
        item_id_column=parsed.item_id_column or InteractionColumns().item,
        text_columns=parsed.text_columns,
        clean=parsed.clean,
        skip_bad_rows=parsed.skip_bad_rows,
        overwrite=parsed.overwrite,
        say=print,
    )


def request_of(parsed: argparse.Namespace) -> PrepareRequest:
    """The request whose fields the parsed arguments name; sources may be `package:NAME/PATH`."""
    given: dict[str, Any] = {
        field.name: getattr(parsed, field.name) for field in fields(PrepareRequest) if hasattr(parsed, field.name)
    }
    for name in _SOURCES:
        if isinstance(source := given[name], list):
            given[name] = tuple(map(resolve_path, source))
        elif source is not None:
            given[name] = resolve_path(source)
    columns = {column.name: getattr(parsed, f"{column.name}_column") for column in fields(InteractionColumns)}
    size = round(parsed.max_archive_gb * _GB)
    return PrepareRequest(**given, columns=InteractionColumns(**columns), max_unpacked_bytes=size)
