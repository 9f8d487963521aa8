"""The manifest of a prepared data set: what it was made from, how, and what came out."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import Any

SCHEMA = 1


def library_version() -> str:
    """Version of the installed distribution, "unknown" when it runs from a bare source tree."""
    try:
        return metadata.version("laser-fast")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class SourceFile:
    """A file that was read: its name without folders, so that no path of a machine is recorded."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    `format`, `sources`, `filters`, `tie_rule` and `options` say how the data set was made, `counts`, `files`
    (SHA-256 of every file written), `dataset_hash` and `split_hash` (of the leave-one-out split; "" if nobody split
    it yet) what it is.
    """

    format: str
    tie_rule: str
    sources: tuple[SourceFile, ...] = ()
    filters: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    dataset_hash: str = ""
    split_hash: str = ""
    library_version: str = field(default_factory=library_version)
    schema: int = SCHEMA

    def recipe(self) -> dict[str, Any]:
        """The part that decides the result: equal recipes give equal data sets."""
        whole = json.loads(self.to_json())
        return {name: whole[name] for name in ("schema", "format", "sources", "filters", "tie_rule", "options")}

    def to_json(self) -> str:
        """Indented JSON with sorted keys, ending in a newline."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse what `to_json` wrote.

        Raises:
            ValueError: not JSON, unknown or missing keys, or another schema version.
        """
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Manifest.from_json: the text must be JSON, got {error}") from error
        if not isinstance(value, Mapping):
            raise ValueError(f"Manifest.from_json: the text must hold an object, got {type(value).__name__}")
        if value.get("schema") != SCHEMA:
            raise ValueError(
                f"Manifest.from_json: schema must be {SCHEMA}, got {value.get('schema')!r}; prepare the data set again"
            )
        value = {"split_hash": "", **value}
        names = {entry.name for entry in fields(cls)}
        if set(value) != names:
            raise ValueError(
                f"Manifest.from_json: keys must be {sorted(names)}, "
                f"got unknown {sorted(set(value) - names)} and missing {sorted(names - set(value))}"
            )
        try:
            sources = tuple(SourceFile(**source) for source in value["sources"])
        except TypeError as error:
            raise ValueError(f"Manifest.from_json: sources must hold name, sha256 and bytes, got {error}") from error
        return cls(**{**value, "sources": sources})
