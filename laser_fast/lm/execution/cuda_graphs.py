"""Recordings of runs on fixed tensors, and the order in which a device may do them: CUDA graphs of one memory pool."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Tensor]

_WARMUP_RUNS = 2  # before a capture: compilation, tuning and the workspaces of libraries happen there


class Recorder:
    """Records nothing and runs again: for a device that has done its work when a call returns."""

    def record(self, run: Run) -> Run:
        """Turn a run on fixed tensors into one that does the same again, into the same output."""
        return run

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """What is called in here is done by the device after all that was called in here before, by any thread."""
        yield

    def finish(self) -> None:
        """Wait until the device has done all that was called `in_turn`; after it recordings may be dropped."""


class CudaGraphs(Recorder):
    """Records CUDA graphs whose intermediate results share one pool of memory.

    Two of them at the same time would overwrite each other's results, and a caller on another stream the inputs of the
    one before it: so there is one event, after the latest replay and what was read of it, that every turn waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = torch.cuda.Event()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def record(self, run: Run) -> Run:
        """Run it a few times and capture it; gives what replays it.

        Meanwhile other threads may use the device, but not draw random numbers there: some versions of torch refuse.
        """
        if self._streams is None:
            # cuBLAS keeps a workspace a stream, which newer versions of torch free with any graph captured there.
            # Warmed up on the stream of the capture it would lie outside of the pool, free for others' tensors.
            self._streams = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        warmup, capture = self._streams
        current = torch.cuda.current_stream(self._device)
        warmup.wait_stream(current)
        with torch.cuda.stream(warmup):
            for _ in range(_WARMUP_RUNS):
                run()
        current.wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        # the outer context: a capture that fails does not leave its stream
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
        """That of the graphs there are; torch gives up a pool with its last graph and refuses its name afterwards."""
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
