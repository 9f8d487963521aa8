"""The fast attention backends: which one is chosen, and that it is asked for exactly what was meant.

No GPU is needed: in the place of the kernels stand functions with their signatures (each release of torch that differs)
and plain arithmetic inside.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from laser_fast.nn import attention, attention_flash
from laser_fast.nn.attention import varlen_attention
from laser_fast.nn.attention_flash import AttentionKind, choose_backend, choose_fast

LENGTHS_Q, LENGTHS_K = [5, 1, 0, 7], [9, 1, 4, 7]


def flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, ...], scale: float, window: tuple[int, int]
) -> Tensor:
    """What FlashAttention computes: bottom-right aligned, (left, right) keys beside the own one, -1 = all."""
    rows = []
    groups = query.shape[1] // key.shape[1]
    starts_q, starts_k = (tensor.tolist() for tensor in bounds)
    for b in range(len(starts_q) - 1):
        q, k, v = query[starts_q[b] : starts_q[b + 1]], *(t[starts_k[b] : starts_k[b + 1]] for t in (key, value))
        position = torch.arange(len(q))[:, None] + len(k) - len(q)
        index = torch.arange(len(k))[None]
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if window[0] >= 0:
            seen &= index >= position - window[0]
        if window[1] >= 0:
            seen &= index <= position + window[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, -torch.inf)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(), v))
    return torch.cat(rows)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    assert (max_q, max_k) == (max(LENGTHS_Q), max(LENGTHS_K))
    assert (dropout_p, softcap) == (0.0, 0.0) and softmax_scale is not None
    return flash(q, k, v, (cu_q, cu_k), softmax_scale, (window_size[0], 0) if causal else window_size)


def varlen_attn_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert (max_q, max_k) == (max(LENGTHS_Q), max(LENGTHS_K))
    return flash(query, key, value, (cu_seq_q, cu_seq_k), scale or query.shape[2] ** -0.5, window_size)


def varlen_attn_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    assert query.shape[1] == key.shape[1]
    return flash(query, key, value, (cu_seq_q, cu_seq_k), query.shape[2] ** -0.5, (-1, 0 if is_causal else -1))


KERNELS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "flash-attn": ("flash_attn_function", flash_attn_varlen_func),
    "torch 2.13": ("torch_varlen_function", varlen_attn_2_13),
    "torch 2.10": ("torch_varlen_function", varlen_attn_2_10),
}


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One kernel installed, and CPU tensors taken for those of a GPU."""
    where, function = KERNELS[request.param]
    for name in ("flash_attn_function", "torch_varlen_function"):
        monkeypatch.setattr(attention_flash, name, lambda found=function if name == where else None: found)

    def on_cpu(query: Tensor, key: Tensor, kind: AttentionKind, *, has_sinks: bool) -> Any:
        return choose_fast(kind, grouped=query.shape[1] != key.shape[1])

    monkeypatch.setattr(attention, "choose_backend", on_cpu)
    return request.param


def inputs(heads_k: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(sum(size), heads, 8, generator=generator, dtype=torch.float64)
        for size, heads in ((LENGTHS_Q, 4), (LENGTHS_K, heads_k), (LENGTHS_K, heads_k))
    ]
    bounds = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (LENGTHS_Q, LENGTHS_K)]
    return tensors, (bounds[0], bounds[1])


@pytest.mark.parametrize("window", [None, 1, 3], ids=["full", "window 1", "window 3"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("scale", [None, 0.9], ids=["own scale", "given scale"])
@pytest.mark.parametrize("heads_k", [4, 2], ids=["multi-head", "grouped-query"])
@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_every_kernel_is_asked_for_what_was_meant(
    kernel: str, heads_k: int, scale: float | None, causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, bounds = inputs(heads_k)
    options = {"causal": causal, "scale": scale, "sliding_window": window}
    fast = varlen_attention(*tensors, *bounds, **options)
    chosen = choose_fast(AttentionKind(causal, 1.0, window), grouped=heads_k == 2)[0]
    limited = kernel == "torch 2.10" and (heads_k == 2 or window is not None)
    assert chosen == ("buckets" if limited else "flash-attn" if kernel == "flash-attn" else "torch varlen")
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: ("buckets", None))
    torch.testing.assert_close(fast, varlen_attention(*tensors, *bounds, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_a_sequence_without_keys_gives_zeros_whatever_the_kernel_says(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (query, key, value), (bounds, _) = inputs(4)
    keys = torch.tensor([0, 9, 9, 13, 20], dtype=torch.int32)  # the second has a query and no key
    where, function = KERNELS[kernel]

    def spoils(*arguments: Any, **options: Any) -> Tensor:
        monkeypatch.setattr(f"{__name__}.LENGTHS_K", [9, 0, 4, 7])
        output = function(*arguments, **options)
        output[5] = torch.nan  # some releases do
        return output

    spoils.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    monkeypatch.setattr(attention_flash, where, lambda: spoils)
    output = varlen_attention(query, key[:20], value[:20], bounds, keys, causal=True)
    assert torch.equal(output[5], torch.zeros_like(output[5]))
    assert bool(output.isfinite().all())


@pytest.mark.parametrize("kernel", ["torch 2.13"], indirect=True)
def test_what_torch_cannot_do_goes_through_the_buckets(kernel: str) -> None:
    assert choose_fast(AttentionKind(True, 1.0, dropout=0.1), grouped=False)[0] == "buckets"
    assert choose_fast(AttentionKind(True, 1.0, softcap=30.0), grouped=False)[0] == "buckets"


def test_cpu_tensors_go_through_the_buckets() -> None:
    query = torch.zeros(3, 2, 8, dtype=torch.bfloat16)
    assert choose_backend(query, query, AttentionKind(True, 1.0), has_sinks=False) == ("buckets", None)


def test_the_torch_here_has_a_signature_we_know() -> None:
    function = attention_flash.torch_varlen_function()
    if function is None:
        pytest.skip("this torch has no torch.nn.attention.varlen")
    known = set(inspect.signature(function).parameters)
    assert {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= known
    assert {"is_causal", "window_size"} & known


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
@pytest.mark.parametrize("heads_k", [32, 8], ids=["multi-head", "grouped-query"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu_against_float64(dtype: torch.dtype, heads_k: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths_q, lengths_k = [50, 1, 0, 130], [82, 33, 0, 162]
    tensors = [
        torch.randn(sum(size), heads, 64, generator=generator).to("cuda", dtype).requires_grad_()
        for size, heads in ((lengths_q, 32), (lengths_k, heads_k), (lengths_k, heads_k))
    ]
    bounds = [torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32) for lengths in (lengths_q, lengths_k)]
    kind = AttentionKind(True, 1 / math.sqrt(64), window)
    assert choose_backend(tensors[0], tensors[1], kind, has_sinks=False)[0] != "buckets"
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in tensors]
    options = {"causal": True, "sliding_window": window}
    output = varlen_attention(*tensors, *bounds, **options)
    exact = varlen_attention(*exact_inputs, *bounds, **options)
    probe = torch.randn(output.shape, generator=generator).to("cuda", dtype)
    grads = torch.autograd.grad((output * probe).sum(), tensors)
    exact_grads = torch.autograd.grad((exact * probe.double()).sum(), exact_inputs)
    for actual, expected in [(output, exact), *zip(grads, exact_grads, strict=True)]:
        assert bool(actual.isfinite().all())
        # probabilities are rounded to the inputs' dtype before they meet the values: a few eps
        assert float((actual.double() - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps
