"""Fields of an item table that sort items into kinds: genres, brands, decades."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from laser_fast.data.items import ItemTable

_MOST_KINDS = 100
_LEAST_ITEMS_PER_KIND = 5
_LEAST_FILLED = 0.5  # share of the items that have the field
_TITLES = ("title", "name")
_YEAR = re.compile(r"\d{4}")
_SEPARATOR = re.compile(r"[|;,]")


@dataclass(frozen=True)
class Categories:
    """The kinds that one field gives.

    Attributes:
        field: its name.
        names: the kinds, most items first.
        of_item: indices into `names` for each item, distinct.
    """

    field: str
    names: tuple[str, ...]
    of_item: tuple[tuple[int, ...], ...]


def find_categories(items: ItemTable) -> list[Categories]:
    """The fields that read as kinds, in the order of the table: parts between | ; or commas where a tenth of the values
    has such, whole values, else words; years are put into decades.

    A field counts when at least half of the items have it and it gives 2 to 100 kinds of 5 items each on average. The
    field that names the items never does.
    """
    found = []
    for field, texts in items.fields.items():
        if field == title_field(items):
            continue
        filled = [text for text in texts if text]
        if len(filled) < _LEAST_FILLED * len(texts):
            continue
        if sum(bool(_YEAR.fullmatch(text)) for text in filled) >= 0.9 * len(filled):
            splits: list[Callable[[str], list[str]]] = [_decade]
        else:
            lists = sum(bool(_SEPARATOR.search(text)) for text in filled) >= 0.1 * len(filled)
            splits = [_parts, _whole, str.split] if lists else [_whole, str.split]
        for split in splits:
            kinds = [sorted(set(split(text))) for text in texts]
            counts = Counter(kind for of_one in kinds for kind in of_one)
            total = sum(counts.values())
            if 2 <= len(counts) <= _MOST_KINDS and total >= _LEAST_ITEMS_PER_KIND * len(counts):
                names = sorted(counts, key=lambda kind: (-counts[kind], kind))
                index = {name: position for position, name in enumerate(names)}
                of_item = tuple(tuple(index[kind] for kind in of_one) for of_one in kinds)
                found.append(Categories(field, tuple(names), of_item))
                break
    return found


def title_field(items: ItemTable) -> str | None:
    """The field that names an item: "title" or "name", else the first; None where there are no fields."""
    return next((name for name in _TITLES if name in items.fields), next(iter(items.fields), None))


def item_titles(items: ItemTable, *, longest: int = 80) -> list[str]:
    """A name for every item, shortened to `longest` characters; its id where it has none."""
    field = title_field(items)
    texts: Sequence[str] = items.ids if field is None else items.fields[field]
    names = [text or f"item {external}" for text, external in zip(texts, items.ids, strict=True)]
    return [name if len(name) <= longest else name[: longest - 1].rstrip() + "…" for name in names]


def _whole(text: str) -> list[str]:
    return [text] if text else []


def _parts(text: str) -> list[str]:
    return [part.strip() for part in _SEPARATOR.split(text) if part.strip()]


def _decade(text: str) -> list[str]:
    return [f"{text[:3]}0s"] if _YEAR.fullmatch(text) else []
