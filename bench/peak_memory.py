"""Most bytes that are alive during a run."""

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Peak(NamedTuple):
    """Most bytes at any time.

    Attributes:
        step: on top of what was there before.
        reserved: that torch held of the device, weights and free blocks included; None on a CPU.
    """

    step: int
    reserved: int | None


def peak_of(run: Callable[[], object], device: torch.device) -> Peak:
    """The peak of one run."""
    if device.type != "cuda":
        return Peak(_allocated_on_cpu(run), None)
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return Peak(torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved())


def release() -> None:
    """Give back what no tensor holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _allocated_on_cpu(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
