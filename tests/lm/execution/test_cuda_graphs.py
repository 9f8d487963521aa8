"""Recordings used by several threads, each with a stream of its own: what one of them reads no other overwrites."""

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from laser_fast.lm.execution.cuda_graphs import CudaGraphs, Run
from laser_fast.lm.execution.fixed_shapes import FixedShapes
from laser_fast.lm.frozen_lm import FrozenLM

from ...queued_device import QueuedDevice, QueuedStream
from ..packed import assert_close, packed_inputs, random_prefix
from .test_fixed_shapes import build

Answer = tuple[list[int], int, Tensor]  # lengths, seed, states


class QueuedGraphs(CudaGraphs):
    """Graphs of a `QueuedDevice`: all write their intermediate results to the same memory, as those of a pool."""

    def __init__(self, device: QueuedDevice) -> None:
        super().__init__(torch.device("cpu"))
        self._queued = device
        self._pool_memory = torch.zeros(100_000)
        self.streams_at_record: list[int] = []  # with work to do

    def record(self, run: Run) -> Run:
        self.streams_at_record.append(self._queued.busy_streams)
        output = torch.zeros(0)

        def replay() -> Tensor:
            self._queued.call(intermediate)
            self._queued.call(lambda: output.copy_(self._pool_memory[: output.numel()].view_as(output)))
            return output

        def intermediate() -> None:
            self._pool_memory[: output.numel()].copy_(run().flatten())

        with torch.utils._python_dispatch._disable_current_modes():
            output = run().clone()
        return replay


def answers(threads: int, work: Callable[[int], list[Answer]]) -> list[Answer]:
    """What `work(thread)` of so many threads gives; their errors are raised here."""
    with ThreadPoolExecutor(threads) as pool:
        return [answer for part in pool.map(work, range(threads)) for answer in part]


def probed(name: str) -> FrozenLM:
    """A model that has found, with calls of its own, from where it counts positions."""
    lm = build(name)
    assert lm.first_position >= 0
    return lm


def drawn_lengths(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 60, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator).tolist()


@torch.no_grad()
@pytest.mark.parametrize("capacity", [2, 64])
def test_streams_take_turns(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    lm = probed("llama")
    prefix = random_prefix(lm, 1)[0]
    device = QueuedDevice(monkeypatch)
    graphs = FixedShapes(lm, QueuedGraphs(device), capacity=capacity)

    def requests(thread: int) -> list[Answer]:
        found: list[Answer] = []
        with torch.no_grad(), device.on(device.new_stream()):
            for seed in range(8 * thread, 8 * thread + 8):
                lengths = drawn_lengths(seed)
                embeds, cu_seqlens = packed_inputs(lengths, seed=seed)
                with device.queueing():
                    states = graphs(embeds, cu_seqlens, prefix, last_only=True)
                assert states is not None
                found.append((lengths, seed, states))
        return found

    served = answers(4, requests)
    assert len(served) == 32 and device.host_reads == 0
    device.run()
    for lengths, seed, states in served:
        assert_close(states, lm(*packed_inputs(lengths, seed=seed), prefix, last_only=True))


@torch.no_grad()
@pytest.mark.parametrize("reason", ["capacity", "weights", "clear"])
def test_a_recording_is_dropped_when_the_device_is_done_with_it(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    lm = probed("llama")
    device = QueuedDevice(monkeypatch)
    recorder = QueuedGraphs(device)
    graphs = FixedShapes(lm, recorder, capacity=1 if reason == "capacity" else 2)

    def call(lengths: list[int]) -> None:
        inputs = packed_inputs(lengths)
        with device.queueing():
            graphs(*inputs, None, last_only=False)

    with device.on(device.new_stream()):
        call([9])
    assert device.busy_streams == 1
    if reason == "weights":
        lm.model.norm.weight.mul_(2.0)
    if reason == "clear":
        graphs.clear()
        assert device.busy_streams == 0 and len(graphs) == 0
    else:
        call([90])
        assert recorder.streams_at_record == [1, 1]  # each time the one of the call alone


class Graph:
    """In place of `torch.cuda.CUDAGraph`, with torch's rule of pools: one whose last graph is gone takes no other."""

    pools: ClassVar[dict[int, weakref.WeakSet["Graph"]]] = {}

    def pool(self) -> int:
        return next(name for name, graphs in self.pools.items() if self in graphs)

    def replay(self) -> None:
        pass

    @classmethod
    def new_pool(cls) -> int:
        return len(cls.pools)

    @classmethod
    @contextmanager
    def capture(cls, graph: "Graph", *, pool: int, stream: QueuedStream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert torch.cuda.current_stream() is stream
        assert pool not in cls.pools or len(cls.pools[pool])
        cls.pools.setdefault(pool, weakref.WeakSet()).add(graph)
        yield


def test_graphs_share_a_pool_while_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    device = QueuedDevice(monkeypatch)
    for name, substitute in {"CUDAGraph": Graph, "graph": Graph.capture, "graph_pool_handle": Graph.new_pool}.items():
        monkeypatch.setattr(torch.cuda, name, substitute)
    monkeypatch.setattr(Graph, "pools", {})
    recorder, used = CudaGraphs(torch.device("cuda")), []

    def run() -> Tensor:
        used.append(device.current)
        return torch.ones(1)

    kept = [recorder.record(run) for _ in range(3)]
    assert len(Graph.pools) == 1 and [len(graphs) for graphs in Graph.pools.values()] == [3]
    warmup, capture = used[0], used[2]
    assert used == [warmup, warmup, capture] * 3 and len({warmup, capture, device.current}) == 3
    kept.clear()
    kept.append(recorder.record(run))
    assert [len(graphs) for graphs in Graph.pools.values()] == [0, 1]
    assert torch.equal(kept[0](), torch.ones(1))


def load_until(stop: threading.Event) -> None:
    """What a loader does beside the requests: memory of either kind, and copies that the host does not wait for."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for count in range(10**9):
            if stop.is_set():
                return
            pinned = torch.empty(1 + count * 7919 % 2**20).pin_memory()
            copied = pinned.to("cuda", non_blocking=True)
            copied.mul_(2.0)
            torch.empty(2**20, device="cuda")


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_serve_eight_threads_while_a_loader_copies() -> None:
    lm, plain = (build("llama").to("cuda", torch.bfloat16) for _ in range(2))
    lm.fixed_shapes = FixedShapes(lm, capacity=6)  # fewer than there are shapes: captures all along

    def requests(thread: int) -> list[Answer]:
        found: list[Answer] = []
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(50 * thread, 50 * thread + 50):
                lengths = drawn_lengths(seed)
                embeds, cu_seqlens = (tensor.cuda() for tensor in packed_inputs(lengths, seed=seed))
                found.append((lengths, seed, lm(embeds, cu_seqlens, last_only=True)))
            torch.cuda.current_stream().synchronize()
        return found

    stop = threading.Event()
    loader = threading.Thread(target=load_until, args=(stop,))
    loader.start()
    try:
        served = answers(8, requests)
    finally:
        stop.set()
        loader.join()
    assert lm.fixed_shapes.num_captures > 6
    for lengths, seed, states in served:
        embeds, cu_seqlens = (tensor.cuda() for tensor in packed_inputs(lengths, seed=seed))
        expected = plain(embeds, cu_seqlens, last_only=True).float()
        torch.testing.assert_close(states.float(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.gpu
@torch.no_grad()
def test_the_only_graph_is_replaced() -> None:
    """torch gives up a pool with its last graph, and does not take its name again."""
    lm = build("llama").to("cuda", torch.bfloat16)
    graphs = FixedShapes(lm, capacity=1)
    for lengths in ([10], [90], [10], [90]):
        embeds, cu_seqlens = (tensor.cuda() for tensor in packed_inputs(lengths))
        assert graphs(embeds, cu_seqlens, None, last_only=False) is not None
    assert graphs.num_captures == 4
