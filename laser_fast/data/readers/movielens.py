"""MovieLens as published by GroupLens (Harper & Konstan 2015), its release told by the names of its files.

100K: `u.data` (tabs), `u.item` (bars, genres as flags in the order of `u.genre`), Latin-1. 1M and 10M: `ratings.dat`,
`movies.dat` (double colons), Latin-1 in 1M (which has `users.dat`), UTF-8 in 10M. 20M, 25M, 32M and the "latest" ones:
`ratings.csv`, `movies.csv` with headers. Titles hold the year, genres are separated by bars.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from laser_fast.data.preparation.titles import normalize_title
from laser_fast.data.readers.interactions import InteractionColumns
from laser_fast.data.readers.layouts import Layout
from laser_fast.data.readers.streams import Source

_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_NO_GENRES = "(no genres listed)"
Fields = dict[str, list[str]]


@dataclass(frozen=True)
class MovieLensRelease:
    """One release found in a folder or archive.

    Args:
        name: "100k", "1m", "10m" or "csv".
        log, items: its two files.
        log_layout, items_layout: how their rows stand in them.
        columns: of the log.
        item_id: column of the item file.
        texts: columns of the item file that `finish` needs.
        finish: makes the fields "title" and "genres" of them.
    """

    name: str
    log: Source
    items: Source
    log_layout: Layout
    items_layout: Layout
    columns: InteractionColumns
    item_id: str
    texts: tuple[str, ...]
    finish: Callable[[Fields], Fields]


def _titles(titles: Sequence[str]) -> list[str]:
    return [normalize_title(title) for title in titles]


def _finish(fields: Fields) -> Fields:
    genres = ["" if names == _NO_GENRES else ", ".join(names.split("|")) for names in fields["genres"]]
    return {"title": _titles(fields["title"]), "genres": genres}


def _finish_flags(fields: Fields) -> Fields:
    flags = zip(*(fields[genre] for genre in _GENRES_100K), strict=True)
    named = _GENRES_100K[1:]  # the first says that none is known
    genres = [
        ", ".join(genre for genre, flag in zip(named, row[1:], strict=True) if flag.strip() == "1") for row in flags
    ]
    return {"title": _titles(fields["title"]), "genres": genres}


_PLAIN = InteractionColumns("user_id", "item_id", "timestamp", "rating")
_LOG_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_ITEM_COLUMNS_100K = ("item_id", "title", "release_date", "video_release_date", "imdb_url", *_GENRES_100K)


def find_movielens(files: Sequence[Source], where: str) -> MovieLensRelease:
    """The release that `files` belong to.

    Args:
        files: files of the folder or archive.
        where: its name, for errors.

    Raises:
        ValueError: no release or more than one, a file of it is missing or there twice.
    """
    by_name: dict[str, list[Source]] = {}
    for file in files:
        by_name.setdefault(file.name, []).append(file)
    kinds = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}
    found = [(log, items) for log, items in kinds.items() if log in by_name]
    if len(found) != 1 or any(len(by_name.get(name, ())) != 1 for name in found[0]):
        seen = [f"{name} ({len(by_name[name])})" for pair in kinds.items() for name in pair if name in by_name]
        raise ValueError(
            f"find_movielens: MovieLens must be one pair of {', '.join(' and '.join(pair) for pair in kinds.items())}, "
            f"got {', '.join(seen) or 'none of them'} in {where}"
        )
    log, items = (by_name[name][0] for name in found[0])
    if log.name == "u.data":
        return MovieLensRelease(
            *("100k", log, items, Layout("plain", "\t", "latin-1", _LOG_COLUMNS)),
            *(Layout("plain", "|", "latin-1", _ITEM_COLUMNS_100K), _PLAIN, "item_id", ("title", *_GENRES_100K)),
            _finish_flags,
        )
    if log.name == "ratings.dat":
        name, encoding = ("1m", "latin-1") if "users.dat" in by_name else ("10m", "utf-8")
        return MovieLensRelease(
            *(name, log, items, Layout("plain", "::", encoding, _LOG_COLUMNS)),
            *(Layout("plain", "::", encoding, ("item_id", "title", "genres")), _PLAIN, "item_id", ("title", "genres")),
            _finish,
        )
    columns = InteractionColumns("userId", "movieId", "timestamp", "rating")
    return MovieLensRelease(
        "csv", log, items, Layout("csv"), Layout("csv"), columns, "movieId", ("title", "genres"), _finish
    )
