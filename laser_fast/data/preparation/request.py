"""What to prepare, from what, and how: the request that `prepare` carries out."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from laser_fast.data.preparation.order import FILE_ORDER, parse_tie_rule
from laser_fast.data.readers import MAX_UNPACKED_BYTES, InteractionColumns, UnknownItems
from laser_fast.data.time_units import TimeUnit, number_in, parse_time

_SOURCES = ("recbole", "interactions", "movielens", "amazon_2018", "amazon_2023")
_CHOICES = {
    "unknown_items": (None, "error", "drop", "keep"),
    "catalogue": (None, "all", "interacted"),
    "duplicates": ("all", "first", "last"),
    "time_unit": (None, *get_args(TimeUnit)),
}


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare, from what, how.

    Args:
        out: folder of the data set.
        recbole: folder or archive with RecBole atomic files: one `.inter`, at most one `.item`. Or
        interactions, items: an interaction log and an item file (CSV, TSV, JSON lines, Parquet); without an item file
            the catalogue is the items of the log, without texts. Or
        movielens: folder or archive of a MovieLens release, told by its files. Or
        amazon_2018, amazon_2023: the reviews and the metadata of Amazon Reviews.
        columns: names of the log's columns, where the source does not say them itself.
        item_id_column: name of the item file's id column; None: as in the log.
        text_columns: columns of the item file to keep; None: all texts (RecBole: all token columns; MovieLens: title
            and genres; Amazon: title, brand, categories, description).
        title_column: column that becomes the field "title"; None: of RecBole files the first token_seq column with
            "title" in its name, else a column "title" stays what it is.
        year_column: column with the release year, appended to the title; None: of RecBole files `release_year` or
            `year`. With a year, titles are taken for film titles and put right (`normalize_title`).
        tie_rule: order of one user's events with equal timestamps: "file-order", or "hash:SEED" (seeded hash of user
            and item id).
        unknown_items: what an event with an item outside the item file does: "error", "drop" (the event) or "keep"
            (the item, with empty texts). None: "keep" for Amazon, whose metadata has gaps, else "error".
        min_rating: drop events rated lower.
        from_time, to_time: drop events before, and those at or after: a date, or a number in the unit of the log; see
            `parse_time`.
        time_unit: of the log's timestamps, for dates: "s", "ms", "us" or "ns". None: as the source says, else told by
            their size.
        duplicates: of events with one user and one item keep all, the first or the last in time.
        min_user_interactions, min_item_interactions: drop users and items with fewer events, repeatedly.
        max_history: keep only the newest events of a user; after the filters above.
        min_history: drop users with fewer events left; once, after all other filters.
        catalogue: "all" keeps every item of the item file, also those in no sequence; "interacted" only those in one.
            None: "interacted" for Amazon, else "all".
        clean: remove HTML and collapse white space in texts.
        text_max_words: longest text of a field in words.
        skip_bad_rows: leave out rows that cannot be used, and say which.
        max_unpacked_bytes: most bytes an archive may say that it holds.
        overwrite: replace a data set that is already at `out`.

    Raises:
        ValueError: not exactly one source, or a setting out of range.
    """

    out: Path
    recbole: Path | None = None
    interactions: Path | None = None
    items: Path | None = None
    movielens: Path | None = None
    amazon_2018: tuple[Path, Path] | None = None
    amazon_2023: tuple[Path, Path] | None = None
    columns: InteractionColumns = field(default_factory=InteractionColumns)
    item_id_column: str | None = None
    text_columns: tuple[str, ...] | None = None
    title_column: str | None = None
    year_column: str | None = None
    tie_rule: str = FILE_ORDER
    unknown_items: UnknownItems | None = None
    min_rating: float | None = None
    from_time: str | None = None
    to_time: str | None = None
    time_unit: TimeUnit | None = None
    duplicates: Literal["all", "first", "last"] = "all"
    min_user_interactions: int = 1
    min_item_interactions: int = 1
    max_history: int | None = None
    min_history: int = 1
    catalogue: Literal["all", "interacted"] | None = None
    clean: bool = True
    text_max_words: int | None = None
    skip_bad_rows: bool = False
    max_unpacked_bytes: int = MAX_UNPACKED_BYTES
    overwrite: bool = False

    def __post_init__(self) -> None:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"PrepareRequest: exactly one of {', '.join(_SOURCES)} must be given, got {given or None}")
        if self.items is not None and self.interactions is None:
            raise ValueError(f"PrepareRequest: the source {given[0]} brings its own item file, got {self.items} too")
        if self.year_column is not None and self.title_column is None and self.recbole is None:
            raise ValueError(f"PrepareRequest: a year column needs a title column, got {self.year_column!r} alone")
        parse_tie_rule(self.tie_rule)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"PrepareRequest: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        counts = ("min_user_interactions", "min_item_interactions", "min_history", "max_history", "text_max_words")
        for name in (*counts, "max_unpacked_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"PrepareRequest: {name} must be at least 1, got {value}")
        if self.min_rating is not None and math.isnan(self.min_rating):
            raise ValueError(f"PrepareRequest: min_rating must be a number, got {self.min_rating}")
        asked = [text for text in (self.from_time, self.to_time) if text is not None]
        for text in asked:
            parse_time(text)
        # a date and a number can be compared only in the unit of the log
        if self.time_unit is not None or len({number_in(text) is None for text in asked}) == 1:
            self.window(self.time_unit or "s")

    def window(self, unit: TimeUnit) -> tuple[int | float | None, int | float | None]:
        """Both ends of the time window in `unit`: the first that is kept, the first that is not any more.

        Raises:
            ValueError: nothing lies between them.
        """
        start, end = (None if text is None else parse_time(text, unit) for text in (self.from_time, self.to_time))
        if start is not None and end is not None and not start < end:
            raise ValueError(
                f"PrepareRequest: from_time must lie before to_time, got {self.from_time} and {self.to_time}"
            )
        return start, end

    @property
    def has_dates(self) -> bool:
        """Whether an end of the time window is a date, so that the unit of the log's times decides it."""
        return any(text is not None and number_in(text) is None for text in (self.from_time, self.to_time))

    @property
    def amazon(self) -> bool:
        """Whether the source is a release of Amazon Reviews."""
        return self.amazon_2018 is not None or self.amazon_2023 is not None
