"""Most bytes alive during a step: measured, and as the memory plan says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from laser_fast.config import LaserConfig, build_config
from laser_fast.planning.plan import MemoryPlan, Workload, estimate_memory
from reporting.models import settings_of

if TYPE_CHECKING:
    from reporting.context import Context

_FEW_ITEMS = 64  # a catalogue that takes nothing


@dataclass(frozen=True)
class Peak:
    """Bytes of a step.

    Attributes:
        step: most at any time on top of what was there before.
        reserved: most that torch held of the device, weights and free blocks included; None on a CPU.
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


def plan_of_language_model(
    context: Context, shape: str, weights: str, lengths: Tensor, modes: Iterable[str] = ("none",)
) -> MemoryPlan:
    """What the plan says of a run that trains a suffix and nothing else, with sequences of this mean length."""
    first, *_ = modes = list(modes)
    config = build_config(
        LaserConfig,
        {
            "data": "none",
            "output": "none",
            "lm": settings_of(context, shape, weights),
            "bituning": {"prefix": "none", "head": "none", "readout": "suffix"},
            "text": {"residual": False},
            "objective": {"item_gradient": "none", "popularity": False},
            "execution": {"checkpointing": first},
            "training": {},
        },
    )
    mean = float(lengths.double().mean())
    workload = Workload(_FEW_ITEMS, user_tokens=mean - 1, item_tokens=0, history=1)
    return estimate_memory(config, workload, on_gpu=context.on_gpu, modes=modes)
