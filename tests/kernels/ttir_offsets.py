"""Find pointer offsets in Triton's IR that wrap at 32 bits when tensors grow.

An index (of a program, of a loop, or loaded) is below the size of a dimension and fits 32 bits. An index times a size
does not, so such a product must be 64 bits wide wherever an offset is made of it. One product is no other index: the
start of a tile, an index times the tile's length, which the tile's own range is added to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_RESULT = re.compile(r"\s*(%[\w$.-]+)(?::\d+)? = (.*)")
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_LOOP = re.compile(r"scf\.for (%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?) to (%[\w$.-]+(?:#\d+)?)")
_FRESH = ("tt.load", "tt.get_program_id", '"tt.reduce"', "scf.if", "scf.while")  # an index, whatever it was made of


@dataclass(frozen=True)
class Value:
    """What is known of one value of the IR.

    Attributes:
        is_index: Grows with the batch, as sizes and tiles do not.
        wraps: Contains a product of an index and a size at 32 bits.
        starts: Tile lengths that an index was multiplied by.
        lengths: Ranges that were added.
        constant: Its value, where it is one.
    """

    is_index: bool = False
    wraps: bool = False
    starts: frozenset[int] = field(default_factory=frozenset)
    lengths: frozenset[int] = field(default_factory=frozenset)
    constant: int | None = None

    @property
    def is_narrow(self) -> bool:
        return self.wraps or not self.starts <= self.lengths


def _join(values: list[Value], *, is_index: bool = False) -> Value:
    return Value(
        is_index or any(value.is_index for value in values),
        any(value.wraps for value in values),
        frozenset().union(*[value.starts for value in values]),
        frozenset().union(*[value.lengths for value in values]),
    )


def _evaluate(operation: str, operands: list[Value]) -> Value:
    """The result of one operation, given as the text behind the equals sign."""
    if operation.startswith("arith.constant"):
        number = re.match(r"arith\.constant (?:dense<)?(-?\d+)>? : (?:tensor<[\dx]*)?i\d+", operation)
        return Value(constant=int(number[1]) if number else None)
    if operation.startswith("tt.make_range"):
        return Value(lengths=frozenset({int(end[1])}) if (end := re.search(r"end = (\d+)", operation)) else frozenset())
    if operation.startswith(_FRESH):
        return Value(is_index=True)
    result = _join(operands)
    if operation.startswith(("arith.muli", "arith.shli")) and result.is_index and re.search(r"i32>?$", operation):
        factors = [value.constant for value in operands if not value.is_index]
        if operation.startswith("arith.muli") and operation.endswith(": i32") and factors and factors[0] is not None:
            return Value(True, result.wraps, result.starts | {factors[0]}, result.lengths)
        return Value(True, True, result.starts, result.lengths)
    return result


def narrow_offsets(ttir: str) -> list[str]:
    """Lines of the IR that add an offset to a pointer which holds a product of an index and a size at 32 bits."""
    known: dict[str, Value] = {}
    found = []
    for line in ttir.splitlines():
        text = re.sub(r" loc\(.*$", "", line).rstrip()
        if loop := _LOOP.search(text):
            known[loop[1]] = _join([known.get(loop[2], Value()), known.get(loop[3], Value())], is_index=True)
            for name, start in re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)[,)]", text):
                known[name] = _join([known.get(start, Value())], is_index=True)
        if not (result := _RESULT.match(text)):
            continue
        name, operation = result[1], result[2]
        operands = [known.get(operand, Value()) for operand in _NAME.findall(operation)]
        if operation.startswith("tt.addptr") and operands[1].is_narrow:
            found.append(text.strip())
        if operation.startswith("scf.for"):
            operands, operation = [], "scf.if"
        value = _evaluate(operation, operands)
        known[name] = value
        for index in range(8):  # results of an operation with several are called %name#0, %name#1, ...
            known[f"{name}#{index}"] = value
    return found
