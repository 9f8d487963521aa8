"""Sections of settings: read from YAML, overridden from the command line, refused with the name of the key."""

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

_PACKAGE_SCHEME = "package:"


class Settings(BaseModel):
    """Base of all sections: immutable, and a key that is not a field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


AnySettings = TypeVar("AnySettings", bound=Settings)


def build_config(kind: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Validate `values` into `kind`.

    Raises:
        ValueError: for every unknown key (with the nearest known one) and every value that breaks a rule, in one
            message.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problems = [_describe(kind, problem) for problem in error.errors()]
    raise ValueError("configuration: " + "; ".join(problems))


def load_config(kind: type[AnySettings], path: str | Path, overrides: Sequence[str] = ()) -> AnySettings:
    """Read a YAML file and apply `overrides` of the form `section.key=value` (the value is read as YAML).

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken YAML, a malformed override, an unknown key, a value out of range.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"load_config: {path} must be YAML, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"load_config: {path} must hold keys and values, got a {type(values).__name__}")
    return build_config(kind, apply_overrides(values, overrides))


def dump_config(config: Settings) -> str:
    """The effective configuration as YAML, defaults included; `load_config` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve_path(location: str | Path) -> Path:
    """A file-system path, or `package:NAME/INNER` for a file inside an installed package, found, not imported.

    Raises:
        FileNotFoundError: the package is not installed or has no such file; or the path does not exist.
    """
    text = str(location)
    if not text.startswith(_PACKAGE_SCHEME):
        path = Path(text).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"resolve_path: the path must exist, got {text!r}")
        return path
    name, _, inner = text.removeprefix(_PACKAGE_SCHEME).partition("/")
    if not name.isidentifier():
        raise ValueError(f"resolve_path: the package must be a top-level module name, got {name!r} in {text!r}")
    spec = importlib.util.find_spec(name)  # of a top-level name: looks it up, runs nothing of it
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"resolve_path: package {name!r} must be installed, got none; try `pip install {name}`")
    for root in spec.submodule_search_locations:
        if (candidate := Path(root) / inner).exists():
            return candidate
    raise FileNotFoundError(f"resolve_path: package {name!r} must contain {inner!r}, got nothing there")


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with every `section.key=value` of `overrides` set in it.

    Raises:
        ValueError: an override of another form.
    """
    for override in overrides:
        _apply_override(values, override)
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"load_config: an override must read section.key=value, got {override!r}")
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        inner = target.get(section)
        if inner is None:
            inner = target[section] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"load_config: {section!r} in override {override!r} must be a section, got {inner!r}")
        target = inner
    target[last] = yaml.safe_load(text)


def _describe(kind: type[Settings], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, _known_keys(kind), n=1, cutoff=0.5)
        near = near or difflib.get_close_matches(location[-1], [key.split(".")[-1] for key in _known_keys(kind)], n=1)
        return f"unknown key {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
    if problem["type"] == "missing":
        return f"key {name!r} must be set, got nothing"
    where = f"{name}: " if name else ""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own checks, which print the values themselves
        return f"{where}{message}"
    return f"{where}{message}, got {problem['input']!r}"


def _known_keys(kind: type[Settings], prefix: str = "") -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys
