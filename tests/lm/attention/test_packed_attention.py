"""Packed attention against one softmax per sequence, written out in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from laser_fast.lm.attention.packed_attention import AttentionPlan, varlen_attention

LENGTHS = {
    "mixed": ([5, 1, 17, 33, 2], [5, 1, 17, 33, 2]),
    "one": ([1], [1]),
    "empty between": ([0, 3, 0, 16, 0], [0, 3, 0, 16, 0]),
    "longer keys": ([4, 1, 20], [9, 33, 20]),
    "longer queries": ([6, 2, 3], [2, 2, 0]),
    "keys without queries": ([0, 4], [7, 4]),
    "nothing": ([], []),
    "all empty": ([0, 0], [0, 0]),
}


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    causal: bool,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query at a time: `softmax` over the keys it may see, 0 where it sees none."""
    groups = query.shape[1] // key.shape[1]
    rows, start_q, start_k = [], 0, 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        for i in range(length_q):
            position = i + length_k - length_q
            seen = [
                j
                for j in range(length_k)
                if (not causal or j <= position) and (window is None or (position - window < j < position + window))
            ]
            heads = []
            for head in range(query.shape[1]):
                keys = key[[start_k + j for j in seen], head // groups]
                values = value[[start_k + j for j in seen], head // groups]
                scores = keys @ query[start_q + i, head] / math.sqrt(query.shape[2])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head, None]])
                    values = torch.cat([values, torch.zeros_like(query[:1, 0])])
                heads.append(scores.softmax(0) @ values if seen else torch.zeros_like(query[0, 0]))
            rows.append(torch.stack(heads))
        start_q, start_k = start_q + length_q, start_k + length_k
    return torch.stack(rows) if rows else query.new_zeros(query.shape)


def assert_exact(lengths: tuple[list[int], list[int]], heads: tuple[int, int], options: dict[str, Any]) -> None:
    """Output and gradients, those of sinks among them."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(sum(size), count, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for size, count in ((lengths[0], heads[0]), (lengths[1], heads[1]), (lengths[1], heads[1]))
    ]
    if options.pop("with_sinks", False):
        leaves.append(torch.randn(heads[0], generator=generator, dtype=torch.float64, requires_grad=True))
        options["sinks"] = leaves[3]
    output = varlen_attention(*leaves[:3], *map(cu_seqlens, lengths), **options)
    options["window"] = options.pop("sliding_window")
    exact = exact_attention(*leaves[:3], *lengths, **options)
    torch.testing.assert_close(output, exact, rtol=1e-10, atol=1e-12)
    if output.numel():
        probe = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        results = [(output, False), (exact, True)]
        grads = [torch.autograd.grad((one * probe).sum(), leaves, allow_unused=unused) for one, unused in results]
        for grad, exact_grad, leaf in zip(*grads, leaves, strict=True):
            exact_grad = torch.zeros_like(leaf) if exact_grad is None else exact_grad
            torch.testing.assert_close(grad, exact_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3], ids=["full", "window 3"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=["multi-head", "grouped-query"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_attention_of_each_sequence_alone(
    lengths: tuple[list[int], list[int]], heads: tuple[int, int], causal: bool, window: int | None
) -> None:
    assert_exact(lengths, heads, {"causal": causal, "sliding_window": window})


@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.7, False), (None, True), (0.7, True)])
@pytest.mark.parametrize("lengths", [LENGTHS["mixed"], LENGTHS["longer keys"], LENGTHS["longer queries"]])
def test_soft_caps_and_sinks(lengths: tuple[list[int], list[int]], softcap: float | None, with_sinks: bool) -> None:
    options = {"causal": True, "sliding_window": 3, "softcap": softcap, "with_sinks": with_sinks}
    assert_exact(lengths, (4, 2), options)


def test_a_plan_serves_every_layer_of_a_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    boundaries = cu_seqlens([3, 20, 7])
    plan = AttentionPlan(boundaries, causal=True)
    for _ in range(2):
        tokens = torch.randn(30, 2, 4, generator=generator)
        planned = varlen_attention(tokens, tokens, tokens, boundaries, causal=True, plan=plan)
        assert torch.equal(planned, varlen_attention(tokens, tokens, tokens, boundaries, causal=True))


def test_bad_shapes_are_named() -> None:
    tokens = torch.zeros(4, 2, 8)
    boundaries = cu_seqlens([4])
    with pytest.raises(ValueError, match=r"key and value must have one shape, got \(4, 2, 8\) and \(3, 2, 8\)"):
        varlen_attention(tokens, tokens, tokens[:3], boundaries, causal=True)
    with pytest.raises(ValueError, match=r"a multiple of its heads, got \(4, 2, 8\) and \(4, 3, 8\)"):
        varlen_attention(tokens, torch.zeros(4, 3, 8), torch.zeros(4, 3, 8), boundaries, causal=True)
    with pytest.raises(ValueError, match=r"must be \[tokens, heads, head size\], got \(4, 16\)"):
        varlen_attention(tokens.flatten(1), tokens, tokens, boundaries, causal=True)
    with pytest.raises(ValueError, match="must end at the number of query and key tokens, got 5 and 5 for 4 and 4"):
        varlen_attention(tokens, tokens, tokens, cu_seqlens([5]), causal=True)
    with pytest.raises(ValueError, match="same number of sequences, got 1 and 2"):
        varlen_attention(tokens, tokens, tokens, boundaries, cu_seqlens([2, 2]), causal=True)
