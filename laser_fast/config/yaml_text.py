"""YAML files, read with bounds on size, depth and aliases; a key stands once, and an error has its line and column.

A few lines with aliases of aliases stand for more values than memory holds, so what aliases stand for is counted.
"""

from pathlib import Path
from typing import Any, NoReturn

import yaml

_LARGEST = 2**20  # bytes of a file; configurations have some thousand
_DEEPEST = 20  # levels; configurations have four
_TOO_DEEP = f"values must be nested at most {_DEEPEST} levels deep"
_MOST_REPEATED = 10_000  # values that all aliases together stand for; a dump of shared lists has some hundred
_LONGEST_NUMBER = 100  # characters: PyYAML takes a time that grows with their square for numbers to the base of 60
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Reader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what makes a short text long, deep or ambiguous."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._repeated = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # values and levels of each node that is composed, by its identity

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if self._depth == _DEEPEST:
            self._refuse(_TOO_DEEP, event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            self._count_alias(event, node)
        else:
            inner = [self._sizes[id(one)] for one in _children(node)]
            values, levels = [size[0] for size in inner], [size[1] for size in inner]
            self._sizes[id(node)] = 1 + sum(values), 1 + max(levels, default=0)
        return node

    def _count_alias(self, event: Any, node: Any) -> None:
        if id(node) not in self._sizes:
            self._refuse(f"alias {event.anchor!r} must not stand in what it names", event)
        values, levels = self._sizes[id(node)]
        self._repeated += values
        if self._repeated > _MOST_REPEATED:
            self._refuse(f"aliases must stand for at most {_MOST_REPEATED:,} values in all", event)
        if self._depth + levels > _DEEPEST:
            self._refuse(_TOO_DEEP, event)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (name := (key.tag, key.value)) in seen:
                    self._refuse(f"key {key.value!r} must be set once", key)
                seen.add(name)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            self._refuse(f"a number must have at most {_LONGEST_NUMBER} characters, got {len(node.value)}", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # of int, float and date
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error

    def _refuse(self, problem: str, place: Any) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [one for pair in node.value for one in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def parse_yaml(text: str, name: str) -> Any:
    """The value of one YAML document; None where there is nothing in it.

    Args:
        name: what the text is called in errors.

    Raises:
        ValueError: no YAML, or more than one document; names the line and the column.
    """
    try:
        return _Reader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"parse_yaml: {name} must be YAML without faults, got one: {_problem(error)}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a file; an empty file has none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than 1 MiB, or no UTF-8, no YAML, or a list or single value; names the file.
    """
    with Path(path).open("rb") as file:
        content = file.read(_LARGEST + 1)  # not the whole file: there are endless ones
    if len(content) > _LARGEST:
        raise ValueError(f"read_yaml: {path} must have at most {_LARGEST:,} bytes, got more")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte 0x{content[error.start]:02x} at {error.start}"
        raise ValueError(f"read_yaml: {path} must be UTF-8, got {place}") from error
    values = parse_yaml(text, str(path))
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"read_yaml: {path} must hold keys and values, got a {type(values).__name__}")
    return values or {}


def _problem(error: Exception) -> str:
    """What is wrong and where, on one line; PyYAML shows the lines of the text as well."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {chr(error.character)!r} at {error.position}"
    return str(error)
