"""Rotary embedding as an operation: against transformers' own, its gradients, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from laser_fast.ops import rotary_embedding, rotary_embedding_reference


def make(tokens: int = 5, width: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, cos, sin; the halves of the tables differ."""
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(tokens, heads, 8, generator=generator).to(dtype) for heads in (4, 2))
    angles = torch.randn(tokens, width, generator=generator) * 3
    return query, key, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.fixture(params=["reference", "kernel"])
def backend(request: pytest.FixtureRequest) -> str:
    """The operation as the CPU has it, and with its kernel in Triton's interpreter."""
    if request.param == "kernel":
        request.getfixturevalue("triton_on_cpu")
    return str(request.param)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_it_is_the_rotation_of_transformers(backend: str, tokens: int) -> None:
    query, key, cos, sin = make(tokens)
    expected = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None])
    for ours, theirs in zip(rotary_embedding(query, key, cos, sin), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [8, 4, 0])
def test_gradients_are_those_of_the_reference(backend: str, width: int) -> None:
    query, key, cos, sin = make(width=width)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    outputs = rotary_embedding(query, key, cos, sin), rotary_embedding_reference(query, key, cos, sin)
    probes = [torch.randn_like(leaf) for leaf in leaves]
    ours, theirs = (torch.autograd.grad(output, leaves, probes) for output in outputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_what_nobody_needs_has_no_gradient(backend: str) -> None:
    query, key, cos, sin = make()
    query.requires_grad_(), key.requires_grad_()
    for index, (used, other) in enumerate([(query, key), (key, query)]):
        rotated = rotary_embedding(query, key, cos, sin)[index]
        gradient, none = torch.autograd.grad(rotated.square().sum(), [used, other], allow_unused=True)
        assert none is None
        (expected,) = torch.autograd.grad(rotary_embedding_reference(query, key, cos, sin)[index].square().sum(), used)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    rotated, _ = rotary_embedding(query, key.detach(), cos, sin)
    assert torch.autograd.grad(rotated.sum(), query)[0].shape == query.shape


def test_backward_keeps_the_tables_alone() -> None:
    query, key, cos, sin = make()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rotary_embedding(query.requires_grad_(), key.requires_grad_(), cos, sin)
    assert [tensor.data_ptr() for tensor in kept] == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize("width", [8, 4])
def test_gradcheck(width: int) -> None:
    query, key, cos, sin = make(2, width, torch.float64)

    def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_embedding(query, key, cos, sin)

    leaves = query[:, :2].requires_grad_(), key[:, :1].requires_grad_()
    assert torch.autograd.gradcheck(rotate, leaves)
    assert torch.autograd.gradgradcheck(rotate, leaves)


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_and_compile(transposed: bool) -> None:
    query, key, cos, sin = make()
    leaves = query.requires_grad_(), key.requires_grad_()
    torch.library.opcheck(torch.ops.laser_fast.rotary_embedding.default, (*leaves, cos, sin, transposed))
    compiled = torch.compile(rotary_embedding, fullgraph=True, backend="aot_eager")
    pairs = zip(compiled(*leaves, cos, sin), rotary_embedding(*leaves, cos, sin), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_half_precision_is_rounded_once() -> None:
    query, key, cos, sin = make(dtype=torch.bfloat16)
    exact = rotary_embedding_reference(query.double(), key.double(), cos.double(), sin.double())
    for ours, true in zip(rotary_embedding(query, key, cos, sin), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), true, rtol=2**-8, atol=1e-6)  # half a unit in the last place


def test_without_values_nothing_but_the_results_is_made() -> None:
    query, key, cos, sin = (tensor.to("meta") for tensor in make())
    rotated = rotary_embedding(query, key, cos, sin)
    assert [tuple(x.shape) for x in rotated] == [(5, 4, 8), (5, 2, 8)]
    assert all(x.is_meta for x in rotated)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(5, 4, 8).long()}, TypeError, "query must be floating point, got torch.int64"),
        ({"key": torch.zeros(5, 2, 8).half()}, TypeError, "key must be torch.float32, got torch.float16"),
        ({"query": torch.zeros(5, 32)}, ValueError, r"query must have 3 dimensions, got shape \(5, 32\)"),
        ({"cos": torch.zeros(1, 5, 8)}, ValueError, r"cos must have 2 dimensions, got shape \(1, 5, 8\)"),
        ({"sin": torch.zeros(5, 8, device="meta")}, ValueError, "all tensors must be on one device"),
        (
            {"key": torch.zeros(4, 2, 8)},
            ValueError,
            r"query and key must agree in tokens and head size, got \(5, 4, 8\) and \(4, 2, 8\)",
        ),
        ({"sin": torch.zeros(5, 6)}, ValueError, r"cos and sin must be \[5, R\], got \(5, 8\) and \(5, 6\)"),
        ({"cos": torch.zeros(4, 8), "sin": torch.zeros(4, 8)}, ValueError, r"cos and sin must be \[5, R\], got \(4, 8"),
        (
            {"cos": torch.zeros(5, 3), "sin": torch.zeros(5, 3)},
            ValueError,
            "cos must have an even width of at most 8, got 3",
        ),
        (
            {"cos": torch.zeros(5, 10), "sin": torch.zeros(5, 10)},
            ValueError,
            "cos must have an even width of at most 8, got 10",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("query", "key", "cos", "sin"), make(), strict=True)) | changes
    with pytest.raises(error, match=f"^rotary_embedding: {message}"):
        rotary_embedding(**arguments)
