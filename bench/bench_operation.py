"""The Python around a kernel: an operation called directly, as eager code does, against its custom op; and its checks.

The operation computes nothing, so that nothing else is measured.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forms import one_pass
from timing import Run, interleaved_medians, wall_clock
from torch import Tensor

from laser_fast.ops import segment_sum
from laser_fast.ops.operation import operation
from laser_fast.ops.segments import validate_cu_seqlens

_CALLS = 100  # a round; one call is too short for the clock


def _nothing(values: Tensor, expert: Tensor) -> Tensor:
    return values.new_empty(values.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _make(name: str, *, directly: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """An operation and its gradient, which are both called directly, or both through the dispatcher."""
    forward, backward = (operation(f"laser_fast_bench::{name}{suffix}")(_nothing) for suffix in ("", "_backward"))
    run = backward if directly else backward.registered
    forward.register_autograd(lambda ctx, grad: (run(grad, *ctx.saved_tensors), None), setup_context=_save)
    return forward if directly else forward.registered


WAYS = {name: _make(name, directly=name == "direct") for name in ("direct", "custom_op")}


def _many(run: Run) -> Run:
    def calls() -> None:
        for _ in range(_CALLS):
            run()

    return calls


def _timed(benchmark: Any, runs: dict[str, Run], shown: str) -> dict[str, float]:
    seconds = interleaved_medians(runs, wall_clock(), budget_s=2.0)
    benchmark.extra_info["median_us"] = {key: round(1e6 * value / _CALLS, 1) for key, value in seconds.items()}
    benchmark.pedantic(runs[shown], rounds=5, warmup_rounds=1)
    return seconds


@pytest.mark.parametrize("name", ["forward", "forward+backward"])
def test_call(name: str, benchmark: Any) -> None:
    values = torch.ones(4, requires_grad=True)
    expert = torch.zeros(2, dtype=torch.int32)

    def one_way(call: Callable[..., Any]) -> Run:
        return _many(one_pass(name, lambda given: call(given, expert), [values]))

    runs = {way: one_way(call) for way, call in WAYS.items()}
    if name == "forward+backward":
        runs["sine"] = _many(one_pass(name, torch.sin, [values]))  # what autograd itself costs
    seconds = _timed(benchmark, runs, "direct")
    benchmark.extra_info["speedup_over_custom_op"] = round(seconds["custom_op"] / seconds["direct"], 2)


def test_looking_at_offsets(benchmark: Any) -> None:
    """What it costs on the CPU to look at the offsets of 256 histories, beside the sum that reads by them."""
    offsets = torch.arange(257, dtype=torch.int32) * 7
    values = torch.randn(256 * 7, 64)
    runs = {
        "look": _many(lambda: validate_cu_seqlens("bench", offsets, 256 * 7)),
        "segment_sum": _many(lambda: segment_sum(values, offsets)),
    }
    seconds = _timed(benchmark, runs, "look")
    benchmark.extra_info["share"] = round(seconds["look"] / seconds["segment_sum"], 3)
