"""How rows stand in a file: by the ending of its name, or as the publisher of a data set documents it.

`.csv`, `.tsv`: a header, comma or tab between values, quotes as in RFC 4180. `.jsonl`, `.ndjson`: one object a line.
`.parquet`: typed columns. `.inter`, `.item`, `.user` (RecBole atomic files): tab between values, no quotes, a header of
`name:type` with the types token, token_seq, float and float_seq. Text is UTF-8 unless a layout says otherwise; all but
Parquet may also be gzipped, with `.gz` behind.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")
RECBOLE_SUFFIXES = (".inter", ".item", ".user")
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_SUFFIXES = (".csv", ".tsv", *_JSON_SUFFIXES, ".parquet", *RECBOLE_SUFFIXES)


@dataclass(frozen=True)
class Layout:
    """How to find rows and values in a file.

    Args:
        kind: "csv" (quotes count), "plain" (they do not), "json" (an object a line) or "parquet".
        delimiter: stands between values; longer than one character only in "plain".
        encoding: of the text.
        columns: names of the columns of a file without a header; of JSON: keys that may be missing in any object.
        typed: the header holds `name:type` as RecBole writes it.
    """

    kind: Literal["csv", "plain", "json", "parquet"]
    delimiter: str = ","
    encoding: str = "utf-8"
    columns: tuple[str, ...] | None = None
    typed: bool = False


def layout_of(name: str) -> Layout:
    """The layout of a file by the ending of its name.

    Raises:
        ValueError: an ending that is not known.
    """
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    if suffix not in _SUFFIXES or name.lower().endswith(".parquet.gz"):
        raise ValueError(
            f"read_rows: the file name must end in {', '.join(_SUFFIXES)} or one of these (not .parquet) and .gz, "
            f"got {name}"
        )
    if suffix in RECBOLE_SUFFIXES:
        return Layout("plain", "\t", typed=True)
    if suffix in _JSON_SUFFIXES:
        return Layout("json")
    if suffix == ".parquet":
        return Layout("parquet")
    return Layout("csv", "\t" if suffix == ".tsv" else ",")
