"""Prefix injection against `torch.cat`, `index_copy_`, the padded form of prefix tuning, and FlexAttention.

The padded form is at its best here: all sequences are equally long, so it pads nothing, and the gradients of a `cat`
along one dimension are views that cost no copy.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from baselines.prefix_kv_packed import inject_cat, inject_cat_loop, inject_index_copy, inject_padded
from forms import PASSES, Compare, CompareForms, Form
from torch import Tensor
from workloads import Case

from laser_fast.lm.attention.packed_attention import varlen_attention
from laser_fast.ops import inject_prefix_kv


class Injection(NamedTuple):
    """Keys and values of one layer: B sequences of `tokens` each, so that a padded batch has no padding."""

    device: str
    sequences: int
    tokens: int
    dtype: torch.dtype
    shared: bool
    prefix: int = 32
    heads: int = 8
    size: int = 128


# one layer of an 8B Llama
_SHAPES = {
    "cpu-16": ("cpu", 16, 256, torch.float32),
    "gpu-16": ("cuda", 16, 256, torch.bfloat16),
    "gpu-128": ("cuda", 128, 128, torch.bfloat16),
}
CASES = [
    Case(f"{name}-{'shared' if shared else 'own'}", mode, Injection(*shape, shared=shared))
    for name, shape in _SHAPES.items()
    for shared in (True, False)
    for mode in (["plain"] if shape[0] == "cpu" else ["plain", "graph"])
]
SHARED = [case for case in CASES if case.workload.shared]


def moved_bytes(shape: Injection, name: str) -> int:
    """Forward reads text and prefixes and writes all rows; backward the other way round. Keys and values."""
    row = shape.heads * shape.size * shape.dtype.itemsize
    text, prefixes = shape.sequences * shape.tokens, shape.prefix * (1 if shape.shared else shape.sequences)
    one_way = 2 * row * (2 * text + prefixes + shape.sequences * shape.prefix)
    return one_way * (2 if name == "forward+backward" else 1)


def make_tensors(shape: Injection) -> list[Tensor]:
    """key, value, prefix_key, prefix_value: leaves."""
    generator = torch.Generator().manual_seed(0)
    text = (shape.sequences * shape.tokens, shape.heads, shape.size)
    prefix = (1 if shape.shared else shape.sequences, shape.prefix, shape.heads, shape.size)
    tensors = [torch.randn(size, generator=generator) for size in (text, text, prefix, prefix)]
    return [tensor.to(shape.device, shape.dtype).requires_grad_() for tensor in tensors]


def make_offsets(shape: Injection) -> Tensor:
    return torch.arange(shape.sequences + 1, dtype=torch.int32, device=shape.device) * shape.tokens


def on_both(inject: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda key, value, prefix_key, prefix_value: (inject(key, prefix_key), inject(value, prefix_value))


def padded_form(shape: Injection, inputs: list[Tensor]) -> Form:
    """On its own layout [B, Hkv, L, d]."""

    def heads_first(tensor: Tensor) -> Tensor:
        return tensor.view(-1, shape.tokens if tensor.dim() == 3 else shape.prefix, shape.heads, shape.size).transpose(
            1, 2
        )

    def packed(text: Tensor, prefix: Tensor) -> Tensor:
        return inject_padded(heads_first(text), heads_first(prefix)).transpose(1, 2).flatten(0, 1)

    own = [heads_first(tensor.detach()).contiguous().requires_grad_() for tensor in inputs]
    return Form(on_both(inject_padded), own, comparable=on_both(packed))


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", CASES, ids=str, indirect=True)
def test_inject_prefix_kv(case: Case, name: str, compare_forms: CompareForms) -> None:
    shape = case.workload
    inputs, cu_seqlens, lengths = make_tensors(shape), make_offsets(shape), [shape.tokens] * shape.sequences
    whole = shape.tokens + shape.prefix
    rows = torch.arange(shape.sequences * whole, device=shape.device).view(shape.sequences, whole)
    prefix_rows, text_rows = rows[:, : shape.prefix].reshape(-1), rows[:, shape.prefix :].reshape(-1)
    forms = {
        "cat": lambda text, prefix: inject_cat(text, prefix, lengths),
        "cat_loop": lambda text, prefix: inject_cat_loop(text, prefix, lengths),
        "index_copy": lambda text, prefix: inject_index_copy(text, prefix, text_rows, prefix_rows),
    }
    baselines = {key: Form(on_both(function), inputs) for key, function in forms.items()}
    candidate = Form(lambda *tensors: inject_prefix_kv(*tensors, cu_seqlens)[:2], inputs)
    moved = moved_bytes(shape, name)
    compare_forms(case, name, candidate, {**baselines, "padded": padded_form(shape, inputs)}, moved_bytes=moved)


@pytest.mark.parametrize("case", SHARED, ids=str, indirect=True)
def test_attention_behind_a_shared_prefix(case: Case, compare: Compare) -> None:
    """Injection and attention together against FlexAttention, which reads the one prefix where it lies."""
    if case.workload.device == "cpu":
        pytest.skip("FlexAttention is compiled for a GPU only")
    if case.mode != "plain":
        pytest.skip("both forms are timed as they are called")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = case.workload
    cu_seqlens, (key, value, prefix_key, prefix_value) = make_offsets(shape), [x.detach() for x in make_tensors(shape)]
    num_tokens = shape.sequences * shape.tokens
    query = torch.randn(num_tokens, 4 * shape.heads, shape.size, device=shape.device, dtype=shape.dtype)

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        text = k - shape.prefix
        return (text < 0) | ((text // shape.tokens == q // shape.tokens) & (text <= q))

    mask = create_block_mask(seen, None, None, num_tokens, shape.prefix + num_tokens, device=shape.device)
    flex = torch.compile(flex_attention, dynamic=False)

    def flexible() -> Tensor:
        keys, values = (
            torch.cat([x[0], y]).transpose(0, 1)[None] for x, y in ((prefix_key, key), (prefix_value, value))
        )
        return flex(query.transpose(0, 1)[None], keys, values, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    def injected() -> Tensor:
        keys, values, cu_seqlens_k = inject_prefix_kv(key, value, prefix_key, prefix_value, cu_seqlens)
        return varlen_attention(query, keys, values, cu_seqlens, cu_seqlens_k, causal=True)

    torch.testing.assert_close(injected(), flexible(), rtol=2e-2, atol=2e-2)
    facts = {"shape": {**shape._asdict(), "dtype": str(shape.dtype)}}
    compare(injected, {"flex_attention": flexible}, moved_bytes=moved_bytes(shape, "forward"), **facts)
