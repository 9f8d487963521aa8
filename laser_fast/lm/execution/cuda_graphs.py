"""Recordings of runs on fixed tensors, and the order in which a device replays them: CUDA graphs of one memory pool."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Tensor]

_WARMUP_RUNS = 2  # before a capture: compilation, tuning and the workspaces of libraries happen there


class Recorder:
    """Runs again instead of recording, for a device that has done its work when a call returns."""

    def record(self, run: Run) -> Run:
        """Turn a run on fixed tensors into one that repeats it, into the same output."""
        return run

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """While this is open, what is called starts on the device after all earlier turns of all threads."""
        yield

    def finish(self) -> None:
        """Wait until the device has done all turns, so that recordings may be dropped."""


class CudaGraphs(Recorder):
    """Records CUDA graphs whose intermediate results share one pool of memory.

    Two at the same time would overwrite each other's results, and a caller on another stream the inputs of the one
    before it. So every turn waits for an event behind the latest replay and the reads of its output.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = torch.cuda.Event()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def record(self, run: Run) -> Run:
        """Run a few times, capture, and give what replays.

        Meanwhile other threads may use the device, but in some versions of torch not draw random numbers there.
        """
        if self._streams is None:
            # newer versions of torch free the cuBLAS workspace of a stream with any graph captured there; warmed up on
            # the stream of the capture, the workspace would lie outside of the pool, free for other tensors
            self._streams = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        warmup, capture = self._streams
        current = torch.cuda.current_stream(self._device)
        warmup.wait_stream(current)
        with torch.cuda.stream(warmup):
            for _ in range(_WARMUP_RUNS):
                run()
        current.wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        # the outer context restores the stream after a capture that fails
        with (
            torch.cuda.stream(capture),
            torch.cuda.graph(graph, pool=self._pool(), stream=capture, capture_error_mode="thread_local"),
        ):
            output = run()
        self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def _pool(self) -> Any:
        """The pool of the graphs there are; torch refuses a pool whose last graph is gone."""
        for graph in self._graphs:
            return graph.pool()
        return torch.cuda.graph_pool_handle()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """As `Recorder` says; the caller holds a lock."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def finish(self) -> None:
        """As `Recorder` says."""
        self._done.synchronize()
