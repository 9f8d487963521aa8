"""Random calls of every public operation, each beside the same in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from fuzz_drawing import Call, Draw
from torch import Tensor

from laser_fast.lm.attention.packed_attention import varlen_attention
from laser_fast.ops import (
    ItemLists,
    catalog_cross_entropy,
    catalog_cross_entropy_reference,
    catalog_topk,
    catalog_topk_reference,
    combine_queries,
    combine_queries_reference,
    cu_seqlens_from_lengths,
    dispatch_queries,
    dispatch_queries_reference,
    inject_prefix_kv,
    inject_prefix_kv_reference,
    rotary_embedding,
    rotary_embedding_reference,
    route_experts,
    route_experts_reference,
    segment_ids,
    segment_mean,
    segment_positions,
    segment_sum,
)
from laser_fast.ops.gated_product import gated_product_backward, gated_product_forward, gated_product_reference
from laser_fast.ops.rms_norm import NormKind, rms_norm_backward, rms_norm_forward, rms_norm_reference

TEMPERATURES = (0.0, -1.0, float("nan"), float("inf"), "1", None)


def segments(draw: Draw) -> Call:
    num_rows = draw.size(6)
    shape = (num_rows, *[draw.size(3) for _ in range(draw.size(2))])
    values = draw.floats(*shape, dtype=draw.dtype(), nan=draw.rarely())
    cu_seqlens, fits = draw.offsets(num_rows)
    mean = draw.rarely(0.5)

    def exact(rows: Tensor) -> list[Tensor]:
        sums = []
        for first, last in pairwise(cu_seqlens.tolist()):
            sums.append(rows[first:last].sum(0) / (max(last - first, 1) if mean else 1))
        return [torch.stack(sums) if sums else rows[:0]]

    operation = segment_mean if mean else segment_sum
    return Call(operation.__name__, lambda rows: [operation(rows, cu_seqlens)], exact, [values], fits, ranked=False)


def places(draw: Draw) -> Call:
    num_rows = draw.size(6)
    cu_seqlens, fits = draw.offsets(num_rows, meta=False)
    of_positions = draw.rarely(0.5)

    def exact() -> list[Tensor]:
        lengths = [last - first for first, last in pairwise(cu_seqlens.tolist())]
        found = [place if of_positions else b for b, length in enumerate(lengths) for place in range(length)]
        return [torch.tensor(found, dtype=torch.int64)]

    operation = segment_positions if of_positions else segment_ids
    return Call(operation.__name__, lambda: [operation(cu_seqlens, num_rows)], exact, [], fits)


def lengths(draw: Draw) -> Call:
    numbers = [draw.size(4) for _ in range(draw.size(4))]
    if numbers and draw.rarely(0.4):
        numbers[0] = draw.random.choice([-1, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 2**40])
    given = torch.tensor(numbers, dtype=torch.int64)
    fits = min(numbers, default=0) >= 0 and sum(numbers) < 2**31

    def exact() -> list[Tensor]:
        return [torch.tensor([sum(numbers[:b]) for b in range(len(numbers) + 1)], dtype=torch.int32)]

    return Call("cu_seqlens_from_lengths", lambda: [cu_seqlens_from_lengths(given)], exact, [], fits)


def routing(draw: Draw) -> Call:
    (num_items, width), num_experts = (draw.size(6), draw.size(3)), draw.size(4)
    dtype, nan = draw.dtype(), draw.rarely(0.05)
    leaves = [
        draw.floats(num_items, width, dtype=dtype, nan=nan),
        draw.floats(num_experts, width, dtype=dtype),
        draw.floats(num_experts, dtype=draw.dtype()),
    ]
    cu_seqlens, fits = draw.offsets(num_items)
    top_k, good_k = draw.option(draw.size(max(num_experts, 1)), -1, 7, 1.0, True, None)
    weighting, good_weighting = draw.option(draw.random.choice(["softmax", "renormalize"]), "max", None)
    fits = fits and good_k and good_weighting and 1 <= top_k <= num_experts
    chosen: list[Tensor] = []

    def run(states: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
        found = route_experts(states, weight, bias, cu_seqlens, top_k, weighting=weighting)
        chosen[:] = [found.expert]
        return found.weight, found.pooled, found.balance_loss

    def exact(states: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
        # votes and choices are compared elsewhere: here sums that nearly tie may be ranked either way
        given = [states, weight, bias, cu_seqlens, top_k]
        found = route_experts_reference(*given, weighting=weighting, expert=chosen[0])
        return found.weight, found.pooled, found.balance_loss

    return Call("route_experts", run, exact, leaves, fits)


def dispatch(draw: Draw) -> Call:
    num_experts, top_k = draw.size(3), draw.size(2)
    queries = draw.floats(num_experts, draw.size(2), draw.size(3), dtype=draw.dtype(), nan=draw.rarely(0.05))
    expert, fits = draw.indices((draw.size(3), top_k), num_experts, torch.int32)
    return Call(
        "dispatch_queries",
        lambda queries: [dispatch_queries(queries, expert)],
        lambda queries: [dispatch_queries_reference(queries, expert)],
        [queries],
        fits,
    )


def combine(draw: Draw) -> Call:
    num_users, top_k = draw.size(3), draw.size(3)
    slabs, fits = draw.option(num_users * top_k, num_users * top_k + 1)
    outputs = draw.floats(slabs, draw.size(2), draw.size(3), dtype=draw.dtype(), nan=draw.rarely(0.05))
    weight = draw.floats(num_users, top_k, dtype=draw.dtype())
    return Call(
        "combine_queries",
        lambda *leaves: [combine_queries(*leaves)],
        lambda *leaves: [combine_queries_reference(*leaves)],
        [outputs, weight],
        fits,
    )


def injection(draw: Draw) -> Call:
    num_rows, length, heads, dtype = draw.size(4), draw.size(2), (draw.size(2), draw.size(3)), draw.dtype()
    cu_seqlens, fits = draw.offsets(num_rows)
    num_sequences = max(cu_seqlens.numel() - 1, 0)
    kind, index = draw.random.choice(["each", "shared", "pool"]), None
    num_prefixes = {"each": num_sequences, "shared": 1, "pool": 2}[kind]
    if kind == "pool":
        index, good = draw.indices((num_sequences,), num_prefixes, torch.int32)
        fits = fits and good
    leaves = [draw.floats(num_rows, *heads, dtype=dtype, nan=draw.rarely(0.05)) for _ in range(2)]
    leaves += [draw.floats(num_prefixes, length, *heads, dtype=dtype) for _ in range(2)]
    return Call(
        "inject_prefix_kv",
        lambda *leaves: inject_prefix_kv(*leaves, cu_seqlens, prefix_index=index),
        lambda *leaves: inject_prefix_kv_reference(*leaves, cu_seqlens, prefix_index=index),
        leaves,
        fits,
    )


def catalog_loss(draw: Draw) -> Call:
    num_users, num_items, width = draw.size(3), draw.size(5), draw.size(3)
    leaves = [draw.floats(size, width, dtype=draw.dtype()) for size in (num_users, num_items)]
    target, fits = draw.indices((num_users,), num_items, torch.int64)
    temperature, warm = draw.option(0.5, *TEMPERATURES)
    reduction, known = draw.option(draw.random.choice(["mean", "sum", "none"]), "max", None)
    fits, ignored = fits and warm and known and num_items > 0, None
    if draw.rarely(0.3):
        pairs = draw.size(3)
        (rows, good_rows), (left_out, good_items) = (
            draw.indices((pairs,), size, torch.int64) for size in (num_users, num_items)
        )
        ignored, fits = (rows, left_out), fits and good_rows and good_items
    options = {"temperature": temperature, "normalize": draw.rarely(0.5), "reduction": reduction, "ignored": ignored}
    return Call(
        "catalog_cross_entropy",
        lambda users, items: [catalog_cross_entropy(users, items, target, **options)],
        lambda users, items: [catalog_cross_entropy_reference(users, items, target, **options)],
        leaves,
        fits,
    )


def catalog_best(draw: Draw) -> Call:
    num_users, num_items, width = draw.size(3), draw.size(5), draw.size(3)
    leaves = [draw.floats(size, width, dtype=draw.dtype(), nan=draw.rarely(0.1)) for size in (num_users, num_items)]
    k, fits = draw.option(1 + draw.size(6), 0, -1, 2.0, True, None)
    temperature, warm = draw.option(0.5, *TEMPERATURES)
    fits, exclude, allow = fits and warm, None, None
    if draw.rarely(0.5):
        excluded = draw.size(4)
        bounds, good = draw.offsets(excluded)
        items = torch.randint(-2, num_items + 2, (excluded,), generator=draw.generator)
        exclude, fits = ItemLists(items, bounds), fits and good and bounds.shape[0] == num_users + 1
    if draw.rarely(0.3):
        allowed, good = draw.option(num_items, num_items + 1)
        allow, fits = torch.rand(allowed, generator=draw.generator) < 0.7, fits and good
    options = {"exclude": exclude, "allow": allow, "temperature": temperature, "normalize": draw.rarely(0.5)}
    return Call(
        "catalog_topk",
        lambda users, items: catalog_topk(users, items, k, **options)[:1],
        lambda users, items: catalog_topk_reference(users, items, k, **options)[:1],
        leaves,
        fits,
    )


def gated(draw: Draw) -> Call:
    shape, dtype = (draw.size(3), draw.size(4)), draw.dtype()
    gate, up, grad = (draw.floats(*shape, dtype=dtype, nan=draw.rarely(0.05)) for _ in range(3))
    activation, known = draw.option(draw.random.choice(["silu", "gelu", "gelu_tanh"]), "relu", None)
    (rows, columns), right = draw.option(shape, (shape[0] + 1, shape[1]), (shape[0], shape[1] + 2))
    written = torch.empty(rows, 2 * columns, dtype=dtype)
    halves = written[:, :columns], written[:, columns:]
    shared, apart = draw.option(False, True)
    overlap = shared and written.numel() > 0
    outputs = (halves[0], halves[0]) if shared else halves

    def run(gate: Tensor, up: Tensor, grad: Tensor) -> Sequence[Tensor]:
        product = gated_product_forward(gate, up, activation)
        gated_product_backward(grad, gate, up, activation, *outputs)
        return product, *outputs

    def exact(gate: Tensor, up: Tensor, grad: Tensor) -> Sequence[Tensor]:
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        product = gated_product_reference(*leaves, activation)
        return product.detach(), *torch.autograd.grad(product, leaves, grad.detach())

    fits = known and right and (apart or not overlap)
    return Call("gated_product", run, exact, [gate, up, grad], fits, ranked=False)


def norm(draw: Draw) -> Call:
    num_rows, width, dtype = draw.size(3), 1 + draw.size(4), draw.dtype()
    x, grad = (draw.floats(num_rows, width, dtype=dtype, nan=draw.rarely(0.05)) for _ in range(2))
    weight_width, fits = draw.option(width, width + 1)
    weight = draw.floats(weight_width, dtype=draw.dtype())
    kind = NormKind(float(draw.size(1)), False, 1e-5)
    known, right = draw.option(num_rows, num_rows + 1)

    def run(x: Tensor, weight: Tensor, grad: Tensor) -> Sequence[Tensor]:
        y, reciprocal = rms_norm_forward(x, weight, kind)
        given = reciprocal if right else reciprocal.new_ones(known, 1)
        again, _ = rms_norm_forward(x, weight, kind, given)
        return y, again, rms_norm_backward(grad, x, given, weight, kind)

    def exact(x: Tensor, weight: Tensor, grad: Tensor) -> Sequence[Tensor]:
        leaf = x.detach().requires_grad_()
        y = rms_norm_reference(leaf, weight.detach(), kind)
        return y.detach(), y.detach(), *torch.autograd.grad(y, leaf, grad.detach())

    return Call("rms_norm", run, exact, [x, weight, grad], fits and right, ranked=False)


def rotary(draw: Draw) -> Call:
    num_tokens, half, rest, dtype = draw.size(3), draw.size(2), draw.size(2), draw.dtype()
    query, key = (draw.floats(num_tokens, draw.size(2), 2 * half + rest, dtype=dtype) for _ in range(2))
    rows, fits = draw.option((num_tokens, 2 * half), (num_tokens + 1, 2 * half), (num_tokens, 2 * half + 4))
    tables = [torch.randn(rows, generator=draw.generator) for _ in range(2)]
    return Call(
        "rotary_embedding",
        lambda query, key: rotary_embedding(query, key, *tables),
        lambda query, key: rotary_embedding_reference(query, key, *tables),
        [query, key],
        fits,
    )


def attention(draw: Draw) -> Call:
    num_rows, heads, size = draw.size(5), 1 + draw.size(1), 1 + draw.size(2)
    leaves = [draw.floats(num_rows, heads, size, dtype=draw.random.choice([torch.float32, torch.float64]))]
    leaves += [draw.floats(num_rows, heads, size, dtype=leaves[0].dtype) for _ in range(2)]
    cu_seqlens, fits = draw.offsets(num_rows, meta=False)
    causal = draw.rarely(0.5)

    def exact(*leaves: Tensor) -> list[Tensor]:
        bounds = cu_seqlens.tolist()
        parts = [leaf[:0] for leaf in leaves[:1]]
        for first, last in pairwise(bounds):
            own = (leaf[first:last].transpose(0, 1) for leaf in leaves)
            if last > first:
                parts.append(F.scaled_dot_product_attention(*own, is_causal=causal).transpose(0, 1))
        return [torch.cat(parts)]

    def run(*leaves: Tensor) -> list[Tensor]:
        try:
            return [varlen_attention(*leaves, cu_seqlens, causal=causal)]
        except (ValueError, TypeError) as error:  # offsets are refused under the name of what reads them
            raise type(error)(str(error).replace("lengths_on_host: ", "varlen_attention: ")) from error

    return Call("varlen_attention", run, exact, leaves, fits, typed=False)


KINDS: tuple[Callable[[Draw], Call], ...] = (
    segments,
    places,
    lengths,
    routing,
    dispatch,
    combine,
    injection,
    catalog_loss,
    catalog_best,
    gated,
    norm,
    rotary,
    attention,
)
