"""Inputs of prefix injection that its tests share, and what anyone would write to check them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from laser_fast.ops import backends

LENGTHS = {
    "several": [3, 1, 5],
    "empty-first-middle-last": [0, 4, 0, 0, 2, 0],
    "all-empty": [0, 0, 0],
    "one": [7],
    "one-empty": [0],
    "none": [],
    "many": [(7 * b) % 13 for b in range(300)],
}
KINDS = ("per-sequence", "shared", "pool")

lengths_cases = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
prefix_cases = pytest.mark.parametrize("prefix_length", [0, 1, 4], ids="P={}".format)
kind_cases = pytest.mark.parametrize("kind", KINDS)
dtype_cases = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


class Inputs(NamedTuple):
    """Arguments of `inject_prefix_kv` in its order."""

    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    cu_seqlens: Tensor
    prefix_index: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        """The four that can have a gradient."""
        return list(self[:4])

    def on(self, device: str) -> Inputs:
        return Inputs(*(None if tensor is None else tensor.to(device) for tensor in self))


def make_inputs(
    lengths: list[int],
    prefix_length: int,
    kind: str,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, ...] = (2, 8),
) -> Inputs:
    """Normal numbers; a pool has 5 slots, of which some serve several sequences and one none."""
    generator = torch.Generator().manual_seed(len(lengths) + 31 * prefix_length)
    num_prefixes = {"per-sequence": len(lengths), "shared": 1, "pool": 5}[kind]
    text, prefix = (sum(lengths), *heads), (num_prefixes, prefix_length, *heads)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in (text, text, prefix, prefix)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    slots = torch.tensor([(4, 1, 1, 0)[b % 4] for b in range(len(lengths))], dtype=torch.int32)
    return Inputs(*tensors, cu_seqlens, slots if kind == "pool" else None)


def prefix_of(inputs: Inputs, sequence: int) -> int:
    """The prefix that a sequence takes."""
    if inputs.prefix_index is not None:
        return int(inputs.prefix_index[sequence])
    return 0 if inputs.prefix_key.shape[0] == 1 else sequence


def inject_by_hand(text: Tensor, prefix: Tensor, inputs: Inputs) -> Tensor:
    """A loop over sequences and one `torch.cat`."""
    bounds = inputs.cu_seqlens.tolist()
    pieces = [text.new_empty(0, *text.shape[1:])]
    for b in range(len(bounds) - 1):
        pieces += [prefix[prefix_of(inputs, b)], text[bounds[b] : bounds[b + 1]]]
    return torch.cat(pieces)


def compiled_function(name: str) -> object:
    """An exported function of the library, called as C++ sees it; the test is skipped where there is none."""
    function = backends.load_native().function(name)
    if function is None:
        pytest.skip(f"no compiled library: {backends.load_native().reason}")
    return function


@pytest.fixture(params=["compiled", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An operation on the CPU as it runs with the compiled library, and as it runs without."""
    if request.param == "reference":
        absent = backends.NativeLibrary("none", "hidden by the test", None)
        monkeypatch.setattr(backends, "load_native", lambda: absent)
    elif backends.load_native().module is None:
        pytest.skip(f"no compiled library: {backends.load_native().reason}")
    return str(request.param)
