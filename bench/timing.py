"""How a benchmark measures time: all forms in turn, by the wall clock, or by CUDA events around a captured graph."""

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from time import perf_counter
from typing import Protocol

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]  # seconds of one run

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 50
_WARMUP_RUNS = 3  # before capture: compilation, autotuning and the libraries' workspaces happen here


class Event(Protocol):
    """What is used of `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event: "Event", /) -> float: ...


def nothing() -> None:
    """In place of a flush or a synchronisation that is not needed."""


def rounds_within(budget_s: float, round_s: float, least: int = _LEAST_ROUNDS) -> int:
    """How many rounds of `round_s` fit into the budget, but never so few that a median means nothing."""
    return max(least, min(_MOST_ROUNDS, int(budget_s / max(round_s, 1e-9))))


def interleaved_medians(
    runs: Mapping[str, Run], clock: Clock, budget_s: float, least_rounds: int = _LEAST_ROUNDS
) -> dict[str, float]:
    """Median seconds of each, measured in turn after one warm-up, so that clocks and heat hit all of them.

    Fewer than the usual least rounds are for runs of many seconds, whose spread is small beside their length.
    """
    for run in runs.values():
        run()
    seconds = {name: [clock(run)] for name, run in runs.items()}
    round_s = sum(first for (first,) in seconds.values())
    for _ in range(rounds_within(budget_s, round_s, least_rounds) - 1):
        for name, run in runs.items():
            seconds[name].append(clock(run))
    return {name: median(values) for name, values in seconds.items()}


def wall_clock(synchronize: Run = nothing, flush: Run = nothing) -> Clock:
    """From an idle device to an idle device, launches included."""

    def seconds(run: Run) -> float:
        flush()
        synchronize()
        start = perf_counter()
        run()
        synchronize()
        return perf_counter() - start

    return seconds


def idle_clock(device: torch.device) -> Clock:
    """The wall clock of a device, whatever its cache holds."""
    return wall_clock(torch.cuda.synchronize) if device.type == "cuda" else wall_clock()


def cold_clock(new_event: Callable[[], Event], synchronize: Run, flush: Run, batch: int) -> Clock:
    """Median over a batch of runs on the device, the cache flushed before each.

    The host reads nothing until the batch is over: while the device flushes, it has the next run queued already, so
    that no launch is counted.
    """

    def seconds(run: Run) -> float:
        events = []
        for _ in range(batch):
            start, end = new_event(), new_event()
            flush()
            start.record()
            run()
            end.record()
            events.append((start, end))
        synchronize()
        return median(start.elapsed_time(end) for start, end in events) / 1e3

    return seconds


def warm_clock(new_event: Callable[[], Event], synchronize: Run, batch: int) -> Clock:
    """Mean over a batch of runs back to back: what the run before left in the cache is found there."""

    def seconds(run: Run) -> float:
        start, end = new_event(), new_event()
        start.record()
        for _ in range(batch):
            run()
        end.record()
        synchronize()
        return start.elapsed_time(end) / 1e3 / batch

    return seconds


def cache_flush(device: torch.device) -> Run:
    """Writes a buffer of four times the L2 cache."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(4 * size, dtype=torch.uint8, device=device)
    return buffer.zero_


def clock_of(mode: str, device: torch.device) -> Clock:
    """The clock of a mode of `workloads.Case`; on a GPU every mode but `graph-warm` finds the cache cold."""
    if device.type == "cpu":
        return wall_clock()
    flush, synchronize = cache_flush(device), torch.cuda.synchronize
    if mode == "plain":
        return wall_clock(synchronize, flush)
    new_event = partial(torch.cuda.Event, enable_timing=True)
    if mode == "graph":
        return cold_clock(new_event, synchronize, flush, batch=20)
    return warm_clock(new_event, synchronize, batch=100)


class Captured:
    """A run in a CUDA graph; calling it replays the graph.

    `build` makes the run on the stream that captures it, for autograd runs a backward pass on the stream of its
    forward pass. The run is kept: the graph reads its tensors.
    """

    def __init__(self, build: Callable[[], Run]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run = build()
            for _ in range(_WARMUP_RUNS):
                self._run()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._run()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        self._graph.replay()
