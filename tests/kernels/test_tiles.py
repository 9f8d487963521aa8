"""The table of tiles: complete, safe to reorder, and of candidates that all compute the same; and where kernels run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from laser_fast.kernels import dispatch, routing
from laser_fast.kernels.gated_product import gated_product_backward, gated_product_forward
from laser_fast.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from laser_fast.kernels.rotary import rotary
from laser_fast.kernels.routing import route_forward
from laser_fast.kernels.routing_backward import route_backward
from laser_fast.kernels.tiles import TILES, Key, Tile, multiprocessors, precision_of, running, tile

Make = Callable[..., Any]

AT_8_EXPERTS = [
    pytest.param(key, candidate, id=f"{'-'.join(str(part) for part in key if part)}-{place}")
    for key, tiles in TILES.items()
    for place, candidate in enumerate(tiles)
    if place and key.experts in (0, 8 if key.kernel in ("route_users", "grad_logits") else 16)
]


def test_every_number_of_experts_has_its_tiles() -> None:
    for exponent in range(9):
        for kernel in ("route_users", "grad_logits"):
            assert tile(kernel, 2**exponent).rows >= 1
    for experts in (16, 32, 64, 128, 256):
        for precision in ("half", "float"):
            for size in ("few", "many"):
                assert tile("route_items", experts, precision, size)
            for kernel in ("grad_items", "dispatch_backward"):
                assert tile(kernel, experts, precision)
    assert precision_of(torch.ones(1)) == "float"
    assert {precision_of(torch.ones(1, dtype=dtype)) for dtype in (torch.float16, torch.bfloat16)} == {"half"}


def test_candidates_differ_and_no_order_of_them_changes_what_a_user_gets() -> None:
    for key, tiles in TILES.items():
        assert len(set(tiles)) == len(tiles) <= 3, key
        if key.kernel == "route_items":
            alike = [other for size in ("few", "many") for other in TILES[key._replace(size=size)]]
            assert len({candidate.columns for candidate in alike}) == 1, key
            assert max(candidate.rows for candidate in alike) <= 32, key


def test_a_candidate_runs_for_a_while_only() -> None:
    key, before = Key("sum_partials"), TILES[Key("sum_partials")]
    with running(key, Tile(4, 32, 4)):
        assert tile("sum_partials") == Tile(4, 32, 4)
    assert TILES[key] is before
    with pytest.raises(ZeroDivisionError), running(key, Tile(4, 32, 4)):
        _ = 1 / 0
    assert TILES[key] is before


def test_options_have_the_kernels_names() -> None:
    some = Tile(8, 64, 4, 2)
    assert some.options("BLOCK_N", "BLOCK_D") == {"BLOCK_N": 8, "BLOCK_D": 64, "num_warps": 4, "num_stages": 2}
    assert some.options(columns="BLOCK") == {"BLOCK": 64, "num_warps": 4, "num_stages": 2}


def _routed(inputs: Any) -> tuple[Any, list[Tensor]]:
    """The result of routing, and what its kernels give but the experts, which two near-ties could swap."""
    result = route_forward(*inputs, "softmax")
    grads = torch.ones_like(result.weight), result.pooled.sin(), result.balance_loss
    arguments = (inputs.states, inputs.router, inputs.cu_seqlens, result)
    return result, [
        *result[:3],
        *result[4:],
        *route_backward(grads, *arguments, weighting="softmax", needs=(True, True)),
    ]


def _dispatched(inputs: Any, result: Any) -> list[Tensor]:
    queries = inputs.states[:24].reshape(8, 3, -1)
    outputs = dispatch.dispatch_forward(queries, result.expert)
    combined = dispatch.combine_forward(outputs, result.weight)
    spread = dispatch.combine_backward(combined, outputs, result.weight, needs_outputs=True, needs_weight=True)
    return [combined, *spread, dispatch.dispatch_backward(outputs, result.expert, 8)]


@pytest.fixture(scope="module")
def of_the_first() -> dict[Any, tuple[Any, list[Tensor]]]:
    """What `_routed` gives with the tiles that run, by dtype and size: most of the time of a candidate."""
    return {}


@pytest.mark.parametrize(("key", "candidate"), AT_8_EXPERTS)
def test_every_candidate_gives_what_the_first_gives(
    key: Key, candidate: Tile, routing_inputs: Make, monkeypatch: pytest.MonkeyPatch, of_the_first: dict[Any, Any]
) -> None:
    if key.size == "many":
        monkeypatch.setattr(routing, "SMALL_BATCH", 0)
    dtype = torch.float32 if key.precision == "float" else torch.float16
    inputs = routing_inputs((65, 0, 10), 70, 8, 3, dtype)
    routed = key.kernel in ("route_items", "route_users", "grad_logits", "grad_items", "sum_partials")
    if (dtype, key.size) not in of_the_first:
        of_the_first[dtype, key.size] = _routed(inputs)
    result, expected = of_the_first[dtype, key.size]
    with running(key, candidate):
        actual = _routed(inputs)[1] if routed else _dispatched(inputs, result)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3  # sums in another order, and one rounding to the dtype
    for one, other in zip(actual, expected if routed else _dispatched(inputs, result), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1e-3, other.abs().max().item()))


def test_partial_sums_of_several_steps(routing_inputs: Make) -> None:
    inputs = routing_inputs((300,), 4, 8, 3)
    _, expected = _routed(inputs)
    # of 19 partial sums forward, and of 10 backward
    with running(Key("route_users", 8), Tile(4, 4, 1)), running(Key("sum_partials"), Tile(4, 4, 1)):
        _, actual = _routed(inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_multiprocessors_are_looked_up_once_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    class Properties:
        multi_processor_count = 7

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or Properties())
    multiprocessors.cache_clear()
    try:
        devices = [torch.device("cuda", index) for index in (0, 1, 0, 1)]
        assert [multiprocessors(device) for device in devices] == [7] * 4
        assert multiprocessors(torch.device("cpu")) == 132
    finally:
        multiprocessors.cache_clear()
    assert asked == devices[:2]


def test_kernels_are_launched_under_the_device_of_their_tensors(
    routing_inputs: Make, interpreter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    under: list[Tensor] = []
    launched: list[str] = []
    launch = interpreter.GridExecutor.__call__

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        under.append(tensor)
        yield
        under.pop()

    def recorded(executor: Any, *args: Any, **kwargs: Any) -> Any:
        assert under, executor.fn
        launched.append(executor.fn.__name__)
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    inputs = routing_inputs((30, 10), 8, 8, 3)
    _dispatched(inputs, _routed(inputs)[0])
    rows, ones, tables = torch.ones(4, 8), torch.ones(8), torch.ones(2, 4, 8)
    rotary(rows[:, None], rows[:, None], *tables, transposed=False)
    _, reciprocal = rms_norm_forward(rows, ones, 1e-6, 0.0, False, None)
    rms_norm_backward(rows, rows, reciprocal, ones, 0.0)
    gated_product_forward(rows, rows, "silu")
    gated_product_backward(rows, rows, rows, "silu", rows, rows)
    assert len(set(launched)) == 14


@pytest.mark.gpu
def test_the_second_gpu_serves_its_own_tensors(routing_inputs: Make) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = routing_inputs((30, 10), 8, 8, 3)
    other = type(inputs)(*[tensor.to("cuda:1") for tensor in inputs[:4]], 3)
    (first, ours), (second, theirs) = _routed(inputs), _routed(other)
    ours, theirs = ours + _dispatched(inputs, first), theirs + _dispatched(other, second)
    for one, two in zip(ours, theirs, strict=True):
        assert two.device == torch.device("cuda", 1)
        torch.testing.assert_close(one.cpu(), two.cpu(), rtol=1e-5, atol=1e-6)
