"""How every benchmark measures: candidate and baseline in turn, against a device copy of the same run."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))  # so that `baselines` can be imported; the library stays the installed one

Run = Callable[[], object]

PASSES = ("forward", "backward", "forward+backward")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Benchmarks are named after their operation, bench_x.py, and are no part of the test suite."""
    if file_path.match("bench_*.py"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def paired_medians(candidate: Run, baseline: Run, synchronize: Run, rounds: int = 30) -> tuple[float, float]:
    """Median seconds of each, measured alternately after one warm-up, so that clocks and heat hit both."""
    candidate(), baseline()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, seconds in zip((candidate, baseline), times, strict=True):
            synchronize()
            start = perf_counter()
            run()
            synchronize()
            seconds.append(perf_counter() - start)
    return median(times[0]), median(times[1])


def one_pass(name: str, function: Callable[..., Tensor], inputs: list[Tensor]) -> Run:
    """The forward pass of `function`, its backward pass alone, or both, for inputs that require gradients."""
    if name == "forward":
        return lambda: function(*inputs)
    output = function(*inputs)
    grad = torch.ones_like(output)
    if name == "backward":
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def _synchronize(device: torch.device) -> Run:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written per second by a copy too large for any cache, measured here and now."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    seconds, _ = paired_medians(copy, copy, _synchronize(device), rounds=5)
    return 2 * source.numel() * source.element_size() / seconds / 1e9


Compare = Callable[..., None]


@pytest.fixture
def compare(benchmark: Any, device: torch.device, copy_gb_per_s: float) -> Compare:
    """Time a candidate against named baselines; the figures go into `benchmark.extra_info`."""

    def run(candidate: Run, baselines: dict[str, Run], *, moved_bytes: int, **facts: object) -> None:
        rounds, synchronize = (30 if device.type == "cuda" else 3), _synchronize(device)
        seconds = []
        for name, baseline in baselines.items():
            ours, theirs = paired_medians(candidate, baseline, synchronize, rounds)
            seconds.append(ours)
            benchmark.extra_info[f"speedup_over_{name}"] = round(theirs / ours, 3)
        bandwidth = moved_bytes / median(seconds) / 1e9
        benchmark.extra_info.update(
            facts,
            moved_bytes=moved_bytes,
            bandwidth_gb_per_s=round(bandwidth, 2),
            roofline_fraction=round(bandwidth / copy_gb_per_s, 3),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            candidate()
            benchmark.extra_info["peak_memory_bytes"] = torch.cuda.max_memory_allocated()

        def timed() -> None:
            candidate()
            synchronize()

        benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)

    return run
