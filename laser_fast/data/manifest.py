"""The manifest of a prepared data set: what it was made from, how, and what came out."""

import json
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from laser_fast.files.descriptions import Description, parse_description

SCHEMA = 2


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
    bytes: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    `format`, `sources`, `filters`, `tie_rule` and `options` say how the data set was made, `counts`, `dataset_hash`
    and `split_hash` (of the leave-one-out split; "" if nobody split it yet) what it is.
    """

    __pydantic_config__: ClassVar[ConfigDict] = Description.model_config

    format: str
    tie_rule: str
    sources: tuple[SourceFile, ...] = ()
    filters: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
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
    def from_json(cls, content: str | bytes) -> "Manifest":
        """Parse what `to_json` wrote.

        Raises:
            ValueError: not JSON, unknown or missing keys, values of another type, or another schema version.
        """
        where, version = "Manifest.from_json: manifest.json", ("schema", SCHEMA)
        found = parse_description(cls, content, where, version=version, remedy="prepare the data set again")
        missing = sorted({entry.name for entry in fields(cls)} - json.loads(content).keys())
        if missing:  # a default is for whoever makes a data set, not for a file
            raise ValueError(f"{where} must hold all keys, got none of {missing}")
        return found
