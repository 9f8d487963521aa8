"""JSON files that describe what lies beside them; a key that is missing, unknown or of another type is named."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json

from laser_fast.config.settings import describe_problems


class Description(BaseModel):
    """Base of all descriptions: nothing is converted, and no field has a default, so a missing key is noticed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Kind = TypeVar("Kind")


def parse_description(
    kind: type[Kind], content: str | bytes, where: str, *, version: tuple[str, int] | None = None, remedy: str = ""
) -> Kind:
    """The description that a JSON file holds.

    Args:
        kind: a `Description`, a dataclass with its settings, or a plain type (a dictionary).
        where: begins a message: the function, a colon, and the name of the file.
        version: a key and the one value of it that is read.
        remedy: what to do about a file of another version.

    Raises:
        ValueError: no JSON object, another version, or fields that break a rule; names them.
    """
    if version is not None:
        key, wanted = version
        try:
            found = from_json(content)
        except ValueError as error:
            raise ValueError(f"{where} must be JSON, got {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{where} must be a JSON object, got {type(found).__name__}")
        if found.get(key) != wanted:
            raise ValueError(f"{where} must have {key} {wanted}, got {found.get(key)!r}; {remedy}")
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        raise ValueError(describe_problems(error, where, kind)) from error
