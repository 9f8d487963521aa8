"""Sections of settings: read from YAML, overridden from the command line, refused with the name of the key."""

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from laser_fast.config.yaml_text import parse_yaml, read_yaml

RETIRED: dict[str, tuple[Any, str]] = {
    "RecommenderConfig.hidden_width": (None, ""),
    "RecommenderConfig.weight_decay": (0.0, ""),
    "RecommenderConfig.fold_items": ("aligned", ""),
    "MFormerConfig.cross_attention_freq": (2, ""),
    "BiTuningConfig.deep_prefix_rank": (64, ""),
    "ObjectiveConfig.contrastive_temperature": (0.07, ""),
    "ObjectiveConfig.label_smoothing": (0.1, ""),
    "PromptConfig.item_prompt": ("{text}", ""),
    "RateConfig.weight_decay": (0.01, "training.optimizer"),
    "RateConfig.warmup_fraction": (0.05, "training.optimizer"),
    "RateConfig.max_grad_norm": (1.0, "training.optimizer"),
    "RateConfig.eight_bit": (False, "training.optimizer"),
}
"""Settings of older runs and models: the one value that files may still give, and the section that decides instead."""

_PACKAGE_SCHEME = "package:"
_MOST_PROBLEMS = 10  # told at once
_LONGEST_VALUE = 200  # characters of a value or key that a message shows


class Settings(BaseModel):
    """Base of all sections: immutable, numbers finite, and a key that is not a field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_older_and_partial(cls, values: Any) -> Any:
        """Drop what is retired; a section given in part keeps the other defaults of its place, not of its class."""
        if not isinstance(values, dict):
            return values
        kept = dict(values)
        for key, (only, instead) in RETIRED.items():
            section, _, name = key.partition(".")
            if section == cls.__name__ and name in kept and (value := kept.pop(name)) != only:
                remedy = f"remove it and set {instead}.{name}" if instead else "remove it"
                raise ValueError(
                    f"{name} is no setting any more and must be {only!r}, got {value!r}; {remedy}, or use the version "
                    "of laser_fast that wrote it"
                )
        for name, field in cls.model_fields.items():
            given = kept.get(name)
            if isinstance(given, Mapping) and isinstance(field.default, Settings):
                kept[name] = field.default.model_dump(exclude_unset=True) | dict(given)
        return kept

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `on` and `yes` are truth values, which would count as the number 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"must not be a truth value, got {value}")
        return value


Model = TypeVar("Model", bound=BaseModel)


def build_config(kind: type[Model], values: Mapping[str, Any], where: str = "configuration") -> Model:
    """Validate `values` into `kind`.

    Args:
        where: begins the message.

    Raises:
        ValueError: unknown keys (with the nearest known one) and values that break a rule, all in one message.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: settings must be keys and values, got a {type(values).__name__}")
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(describe_problems(error, where, kind)) from None


def load_config(kind: type[Model], path: str | Path | None, overrides: Sequence[str] = ()) -> Model:
    """Read a YAML file, if any, and apply `overrides` of the form `section.key=value` (the value is read as YAML).

    Raises:
        OSError, ValueError: see `read_yaml`, `apply_overrides` and `build_config`; names the file.
    """
    if path is None:
        return build_config(kind, apply_overrides({}, overrides))
    where = f"{path} with overrides" if overrides else str(path)
    return build_config(kind, apply_overrides(read_yaml(path), overrides), where)


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with every `section.key=value` of `overrides` set in it.

    Raises:
        ValueError: an override of another form.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"load_config: an override must read section.key=value, got {override!r}")
        *sections, last = key.strip().split(".")
        target = values
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            if not isinstance(target := target[section], dict):
                raise ValueError(f"load_config: {section!r} in override {override!r} must be a section, got {target!r}")
        target[last] = parse_yaml(text, f"the value of override {override!r}")
    return values


def dump_config(config: Settings) -> str:
    """The effective configuration as YAML, defaults included; `load_config` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve_path(location: str | Path, what: str = "the path") -> Path:
    """A file-system path, or `package:NAME/INNER` for a file inside an installed package, found, not imported.

    Args:
        what: the setting or argument that names it, for errors.

    Raises:
        FileNotFoundError: the package is not installed or has no such file; or the path does not exist.
    """
    text = str(location)
    if not text.startswith(_PACKAGE_SCHEME):
        path = Path(text).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"resolve_path: {what} must exist, got {text!r}")
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


def describe_problems(error: ValidationError, where: str, kind: type = Settings) -> str:
    """The rules that values break, and the values, in one sentence that begins with `where`.

    Args:
        kind: the model whose keys are proposed for unknown ones.
    """
    problems = error.errors(include_url=False)
    told = [_describe(kind, problem) for problem in problems[:_MOST_PROBLEMS]]
    if len(problems) > _MOST_PROBLEMS:
        told.append(f"and {len(problems) - _MOST_PROBLEMS:,} more")
    return f"{where}: " + "; ".join(told)


def _describe(kind: type, problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)[:_LONGEST_VALUE]
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        known = _known_keys(kind)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or difflib.get_close_matches(
            location[-1][:_LONGEST_VALUE], [key.split(".")[-1] for key in known], n=1
        )
        return f"unknown key {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
    if problem["type"] in ("missing", "missing_argument"):
        return f"key {name!r} must be set, got nothing"
    told = (f"{name}: " if name else "") + problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own checks print the values themselves
        return told
    value = repr(problem["input"])
    if len(value) > _LONGEST_VALUE:
        value = f"{value[:_LONGEST_VALUE]}... ({len(value):,} characters)"
    return f"{told}, got {value}"


def _known_keys(kind: Any, prefix: str = "") -> list[str]:
    """Keys of a model and of the models in it; other types have none."""
    keys = []
    for name, field in getattr(kind, "model_fields", {}).items():
        keys += [prefix + name, *_known_keys(field.annotation, f"{prefix}{name}.")]
    return keys
