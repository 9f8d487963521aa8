"""The fast attention backends: which one is chosen, and that it is asked for exactly what was meant.

No GPU is needed: in the place of the kernels stand functions with their signatures (each release of torch that differs)
and plain arithmetic inside.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from laser_fast.lm.attention import flash as attention_flash
from laser_fast.lm.attention import packed_attention as attention
from laser_fast.lm.attention.flash import (
    AttentionKind,
    PackedLengths,
    choose_backend,
    choose_fast,
    takes_grouped_queries,
    takes_our_arguments,
)
from laser_fast.lm.attention.packed_attention import record_backends, varlen_attention

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
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    assert (max_q, max_k) == (max(LENGTHS_Q), max(LENGTHS_K))
    assert options.keys() == {"dropout_p", "softmax_scale", "causal", "window_size", "softcap"}
    assert (options["dropout_p"], options["softcap"]) == (0.0, 0.0) and options["softmax_scale"] is not None
    window = options["window_size"]
    return flash(q, k, v, (cu_q, cu_k), options["softmax_scale"], (window[0], 0) if options["causal"] else window)


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_forward`: the causal flag closes the right side and leaves the left one as it is."""
    assert query.shape[1] % key.shape[1] == 0 and not return_debug_mask
    if len(cum_seq_q) == len(LENGTHS_Q) + 1:  # not the trial of grouped queries
        assert (max_q, max_k) == (max(LENGTHS_Q), max(LENGTHS_K)) and dropout_p == DROPOUT
    window = window_size_left, 0 if is_causal else window_size_right
    output = flash(query, key, value, (cum_seq_q, cum_seq_k), scale, window)
    return output, *[query.new_empty(0)] * 4


def without_groups(query: Tensor, key: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """The same where grouped queries are refused."""
    if query.shape[1] != key.shape[1]:
        raise RuntimeError("Expect query and key/value to have the same number of heads")
    return flash_attention_forward(query, key, *arguments, **options)


def wrong_groups(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """The same where the heads of the keys are taken in another order."""
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat(1, groups, 1), value.repeat(1, groups, 1)
    return flash_attention_forward(query, key, value, *arguments, **options)


DROPOUT = 0.0
KERNELS: dict[str, tuple[str, Callable[..., Any], str]] = {  # where it is looked up, itself, name with grouped queries
    "flash-attn": ("flash_attn_function", flash_attn_varlen_func, "flash-attn"),
    "torch": ("torch_flash_function", flash_attention_forward, "torch flash"),
    "torch without groups": ("torch_flash_function", without_groups, "torch flash, keys expanded"),
    "torch with wrong groups": ("torch_flash_function", wrong_groups, "torch flash, keys expanded"),
}
CPU = torch.device("cpu")


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One kernel installed, and CPU tensors taken for those of a GPU."""
    where, function, _ = KERNELS[request.param]
    for name in ("flash_attn_function", "torch_flash_function"):
        monkeypatch.setattr(attention_flash, name, lambda found=function if name == where else None: found)

    def on_cpu(query: Tensor, key: Tensor, kind: AttentionKind, *, has_sinks: bool) -> Any:
        return choose_fast(kind, query.device, grouped=query.shape[1] != key.shape[1])

    monkeypatch.setattr(attention, "choose_backend", on_cpu)
    takes_grouped_queries.cache_clear()
    yield request.param
    takes_grouped_queries.cache_clear()


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
@pytest.mark.parametrize("heads_k", [4, 2], ids=["multi-head", "grouped-query"])
@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_every_kernel_is_asked_for_what_was_meant(
    kernel: str, heads_k: int, causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, bounds = inputs(heads_k)
    options = {"causal": causal, "scale": 0.9 if causal else None, "sliding_window": window}
    fast = varlen_attention(*tensors, *bounds, **options)
    chosen = choose_fast(AttentionKind(causal, 1.0, window), CPU, grouped=heads_k == 2)[0]
    assert chosen == (KERNELS[kernel][2] if heads_k == 2 else KERNELS[kernel][2].removesuffix(", keys expanded"))
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: ("buckets", None))
    torch.testing.assert_close(fast, varlen_attention(*tensors, *bounds, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_a_sequence_without_keys_gives_zeros_whatever_the_kernel_says(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (query, key, value), (bounds, _) = inputs(4)
    keys = torch.tensor([0, 9, 9, 13, 20], dtype=torch.int32)  # the second has a query and no key
    where, function, _ = KERNELS[kernel]

    def spoils(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(f"{__name__}.LENGTHS_K", [9, 0, 4, 7])
        output = function(*arguments, **options)
        (output if isinstance(output, Tensor) else output[0])[5] = torch.nan  # some releases do
        return output

    monkeypatch.setattr(attention_flash, where, lambda: spoils)
    output = varlen_attention(query, key[:20], value[:20], bounds, keys, causal=True)
    assert torch.equal(output[5], torch.zeros_like(output[5]))
    assert bool(output.isfinite().all())


@pytest.mark.parametrize("kernel", ["torch"], indirect=True)
def test_a_soft_cap_goes_through_the_buckets_and_dropout_does_not(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_fast(AttentionKind(True, 1.0, softcap=30.0), CPU, grouped=False)[0] == "buckets"
    monkeypatch.setattr(f"{__name__}.DROPOUT", 0.25)
    tensors, bounds = inputs(4)
    with record_backends() as ran:
        varlen_attention(*tensors, *bounds, causal=True, dropout=0.25)
    assert ran == {"torch flash, float64": 1}


@pytest.mark.parametrize("kernel", ["torch without groups", "torch"], indirect=True)
def test_grouped_queries_are_tried_once(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, function, _ = KERNELS[kernel]
    heads: list[int] = []

    def counted(query: Tensor, key: Tensor, *arguments: Any, **options: Any) -> Any:
        heads.append(key.shape[1])
        if query.requires_grad:  # the trial: a kernel's autograd formula keeps all of these
            assert not any(tensor.is_inference() for tensor in (query, key, *arguments[:3]))
        return function(query, key, *arguments, **options)

    monkeypatch.setattr(attention_flash, where, lambda: counted)
    tensors, bounds = inputs(2)
    with torch.inference_mode():  # the trial has a backward pass all the same
        for _ in range(3):
            varlen_attention(*tensors, *bounds, causal=True)
    assert heads == [4, 2] + [4 if kernel == "torch without groups" else 2] * 3


def test_what_ran_is_recorded_while_asked() -> None:
    tensors, bounds = inputs(2)
    with record_backends() as outer:
        with record_backends() as inner:  # as long as it is open both hold the same
            varlen_attention(*[tensor.float() for tensor in tensors], *bounds, causal=True)
        varlen_attention(*tensors, *bounds, causal=True)
    varlen_attention(*tensors, *bounds, causal=True)
    assert outer == {"buckets, float32": 1, "buckets, float64": 1}
    assert inner == {"buckets, float32": 1}


def test_cpu_tensors_go_through_the_buckets() -> None:
    query = torch.zeros(3, 2, 8, dtype=torch.bfloat16)
    assert choose_backend(query, query, AttentionKind(True, 1.0), has_sinks=False) == ("buckets", None)


_COMMON = """_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k,
 SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None,
 SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None"""
_RESULTS = "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
SCHEMAS = {
    "torch 2.11": (f"{_COMMON}) -> {_RESULTS}", True),
    "torch 2.13": (f"{_COMMON}, Tensor? block_table=None, int? num_splits=None) -> {_RESULTS}", True),
    "renamed": (f"{_COMMON}) -> {_RESULTS}".replace("cum_seq_q", "cu_seqlens_q"), False),
    "more needed": (f"{_COMMON}, *, Tensor pages) -> {_RESULTS}".replace(", *, Tensor pages", ", Tensor pages"), False),
}


@pytest.mark.parametrize("release", SCHEMAS)
def test_an_operation_with_other_arguments_is_not_called(release: str) -> None:
    text, fits = SCHEMAS[release]
    assert takes_our_arguments(torch._C.parse_schema(text.replace("\n", ""))) == fits


def test_the_torch_here_has_the_operation_and_its_derivative() -> None:
    """On the meta device, for grouped queries, dropout and a window."""
    operation = attention_flash.torch_flash_function()
    assert operation is not None
    query, key, value = (
        torch.empty(7, heads, 8, dtype=torch.float16, device="meta", requires_grad=True) for heads in (4, 2, 2)
    )
    bounds = torch.tensor([0, 7], dtype=torch.int32, device="meta")
    lengths = PackedLengths(bounds, bounds, 7, 7)
    output = attention_flash._run_torch_flash(query, key, value, lengths, AttentionKind(True, 1.0, 3, dropout=0.1))
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert [tuple(grad.shape) for grad in grads] == [(7, 4, 8), (7, 2, 8), (7, 2, 8)]


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
    assert choose_backend(tensors[0], tensors[1], kind, has_sinks=False)[0] in ("flash-attn", "torch flash")
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


@pytest.mark.gpu
def test_dropout_on_a_gpu_keeps_the_mean_and_draws_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(512, 4, 64, generator=generator).to("cuda", torch.float16) for _ in range(3))
    bounds = torch.tensor([0, 512], device="cuda", dtype=torch.int32)
    with record_backends() as ran:
        drawn = [varlen_attention(query, key, value, bounds, causal=False, dropout=0.2) for _ in range(64)]
    assert "buckets" not in " ".join(ran)
    assert not torch.equal(drawn[0], drawn[1])
    exact = varlen_attention(query.double(), key.double(), value.double(), bounds, causal=False)
    mean = torch.stack(drawn).double().mean(0)
    # 64 draws that keep four fifths: a deviation of sqrt(0.25 / 64) = 6% of the root of the summed squared weights
    assert float((mean - exact).norm() / exact.norm()) < 0.15
