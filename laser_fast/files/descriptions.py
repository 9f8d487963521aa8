"""JSON files that say what lies beside them, read through a model: whatever is missing, unknown or of another type is
refused by its name."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json

from laser_fast.config.settings import describe_problems


class Description(BaseModel):
    """Base of all descriptions: nothing is converted, no key is unknown, no number is NaN or infinite.

    A field has no default: a key that was taken out is missed.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Kind = TypeVar("Kind")
AnyDescription = TypeVar("AnyDescription", bound=Description)


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
        _refuse_another_version(content, *version, where, remedy)
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        raise ValueError(describe_problems(error, where, kind)) from error


def checked_description(kind: type[AnyDescription], values: dict[str, Any], where: str) -> AnyDescription:
    """A description to be written, by the rules it will be read by.

    Raises:
        ValueError: fields that break a rule; names them.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(describe_problems(error, where, kind)) from error


def _refuse_another_version(content: str | bytes, key: str, wanted: int, where: str, remedy: str) -> None:
    try:
        found = from_json(content)
    except ValueError as error:
        raise ValueError(f"{where} must be JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(found).__name__}")
    if found.get(key) != wanted:
        raise ValueError(f"{where} must have {key} {wanted}, got {found.get(key)!r}; {remedy}")
