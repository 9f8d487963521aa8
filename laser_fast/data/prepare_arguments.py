"""Arguments of `laser-fast prepare` and the request they make."""

import argparse
from pathlib import Path
from typing import get_args

from laser_fast.config import resolve_path
from laser_fast.data.order import FILE_ORDER
from laser_fast.data.prepare import PrepareRequest
from laser_fast.data.readers import InteractionColumns, UnknownItems


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast prepare OUT (--recbole FOLDER | --interactions FILE [--items FILE]) ...`."""
    names = InteractionColumns()
    parser.add_argument("out", type=Path, help="folder to write the data set to")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recbole", metavar="FOLDER", help="RecBole atomic files; package:NAME/FOLDER finds a package")
    source.add_argument("--interactions", metavar="FILE", help="interaction log: .csv, .tsv or .jsonl, also .gz")
    parser.add_argument("--items", metavar="FILE", help="item file with texts: .csv, .tsv or .jsonl, also .gz")
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
    parser.add_argument(
        "--tie-rule", default=FILE_ORDER, metavar="RULE", help="equal timestamps: file-order (default) or hash:SEED"
    )
    parser.add_argument(
        "--unknown-items", choices=get_args(UnknownItems), default="error", help="events outside the item file"
    )
    parser.add_argument("--min-rating", type=float, metavar="R", help="leave out events rated lower")
    parser.add_argument("--min-user-interactions", type=int, default=1, metavar="N", help="leave out shorter users")
    parser.add_argument("--min-item-interactions", type=int, default=1, metavar="N", help="leave out rarer items")
    parser.add_argument(
        "--catalogue", choices=("all", "interacted"), default="all", help="keep items that are in no sequence or not"
    )
    parser.add_argument("--no-clean", action="store_true", help="keep HTML and white space in texts as they are")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is already there")


def request_from_arguments(arguments: argparse.Namespace) -> PrepareRequest:
    """The request of parsed arguments; sources may be `package:NAME/PATH`.

    Raises:
        ValueError, FileNotFoundError: see `PrepareRequest` and `resolve_path`.
    """

    def resolved(source: str | None) -> Path | None:
        return None if source is None else resolve_path(source)

    texts = arguments.text_columns
    return PrepareRequest(
        out=arguments.out,
        recbole=resolved(arguments.recbole),
        interactions=resolved(arguments.interactions),
        items=resolved(arguments.items),
        columns=InteractionColumns(
            arguments.user_column, arguments.item_column, arguments.time_column, arguments.rating_column
        ),
        item_id_column=arguments.item_id_column,
        text_columns=None if texts is None else tuple(name.strip() for name in texts.split(",") if name.strip()),
        title_column=arguments.title_column,
        year_column=arguments.year_column,
        tie_rule=arguments.tie_rule,
        unknown_items=arguments.unknown_items,
        min_rating=arguments.min_rating,
        min_user_interactions=arguments.min_user_interactions,
        min_item_interactions=arguments.min_item_interactions,
        catalogue=arguments.catalogue,
        clean=not arguments.no_clean,
        overwrite=arguments.overwrite,
    )
