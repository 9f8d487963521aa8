"""The catalogue: external item ids in index order, with the text columns that describe each item."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

ID_COLUMN = "id"


def update_with_strings(digest: "hashlib._Hash", strings: Sequence[str]) -> None:
    """Feed strings to a hash with their lengths, so that ["ab", "c"] and ["a", "bc"] differ."""
    digest.update(len(strings).to_bytes(8, "little"))
    for string in strings:
        encoded = string.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)


def first_duplicate(ids: Sequence[str]) -> str | None:
    """The first id that was already seen, or None."""
    seen: set[str] = set()
    for external in ids:
        if external in seen:
            return external
        seen.add(external)
    return None


class ItemTable:
    """Items 0..I-1: `ids[i]` is the external id of item i, `fields[name][i]` its text in column `name`.

    Args:
        ids: external ids, distinct and not empty; their order is the item index.
        fields: text columns, each as long as `ids`; a missing text is "".

    Raises:
        ValueError: an id is empty or repeated, a column has another length, or a column is called "id".
        TypeError: an id or a text is not a string.
    """

    def __init__(self, ids: Sequence[str], fields: Mapping[str, Sequence[str]] | None = None) -> None:
        self.ids: list[str] = list(ids)
        self.fields: dict[str, list[str]] = {name: list(column) for name, column in (fields or {}).items()}
        self._check()
        self._index = {external: index for index, external in enumerate(self.ids)}

    def _check(self) -> None:
        for external in self.ids:
            if not isinstance(external, str):
                raise TypeError(f"ItemTable: item ids must be strings, got {external!r}")
            if not external:
                raise ValueError("ItemTable: item ids must not be empty, got ''")
        if (repeated := first_duplicate(self.ids)) is not None:
            raise ValueError(f"ItemTable: item ids must be distinct, got {repeated!r} twice")
        for name, column in self.fields.items():
            if name == ID_COLUMN or not name:
                raise ValueError(f"ItemTable: a text column must have a name other than {ID_COLUMN!r}, got {name!r}")
            if len(column) != len(self.ids):
                raise ValueError(
                    f"ItemTable: column {name!r} must have one text per item ({len(self.ids)}), got {len(column)}"
                )
            for text in column:
                if not isinstance(text, str):
                    raise TypeError(f"ItemTable: column {name!r} must hold strings, got {text!r}")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ItemTable({len(self)} items, fields {sorted(self.fields)})"

    def index_of(self, ids: Sequence[str]) -> np.ndarray:
        """Item indices of external ids, int64 [len(ids)]; -1 where an id is unknown."""
        return np.fromiter((self._index.get(external, -1) for external in ids), dtype=np.int64, count=len(ids))

    def hash(self) -> str:
        """SHA-256 of the item map: the external ids in index order. Texts are not part of it."""
        digest = hashlib.sha256()
        update_with_strings(digest, self.ids)
        return digest.hexdigest()
