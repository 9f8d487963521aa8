"""Rotation of queries and keys against transformers' own form, eager and compiled."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from forms import PASSES, CompareForms, CompileForms, Form
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from workloads import Case

from laser_fast.ops import rotary_embedding


class Heads(NamedTuple):
    """Queries and keys of one layer as its projections give them."""

    device: str
    tokens: int
    dtype: torch.dtype
    query_heads: int = 32
    key_heads: int = 8
    size: int = 128


# one layer of an 8B Llama, and of a model of 0.6B
_SHAPES = {
    "cpu-0.6B": Heads("cpu", 2048, torch.float32, 16, 8),
    "gpu-0.6B": Heads("cuda", 8192, torch.bfloat16, 16, 8),
    "gpu-8B": Heads("cuda", 8192, torch.bfloat16),
}
CASES = [
    Case(name, mode, shape)
    for name, shape in _SHAPES.items()
    for mode in (["plain"] if shape.device == "cpu" else ["plain", "graph"])
]


def moved_bytes(shape: Heads, name: str) -> int:
    """Queries and keys are read and written once each way, the tables read."""
    numbers = 2 * (shape.query_heads + shape.key_heads) + 2
    one_way = shape.tokens * numbers * shape.size * shape.dtype.itemsize
    return one_way * (2 if name == "forward+backward" else 1)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", CASES, ids=str, indirect=True)
def test_rotary_embedding(case: Case, name: str, compiled: CompileForms, compare_forms: CompareForms) -> None:
    shape = case.workload
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(shape.tokens, heads, shape.size, generator=generator)
        for heads in (shape.query_heads, shape.key_heads)
    )
    inputs = [tensor.to(shape.device, shape.dtype).requires_grad_() for tensor in (query, key)]
    angles = (torch.rand(shape.tokens, shape.size // 2, generator=generator) * 6).repeat(1, 2).to(shape.device)
    cos, sin = angles.cos().to(shape.dtype), angles.sin().to(shape.dtype)

    def of_transformers(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        turned = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None])
        return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)

    baselines = compiled({"transformers": Form(of_transformers, inputs)})
    candidate = Form(lambda query, key: rotary_embedding(query, key, cos, sin), inputs)
    compare_forms(case, name, candidate, baselines, moved_bytes=moved_bytes(shape, name))
