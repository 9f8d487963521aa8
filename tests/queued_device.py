"""A device without hardware: CPU tensors whose work is queued a stream and done later, in any order that is allowed.

What is called on a stream happens after what was called there before, and otherwise only events say what happens
first. Work of several streams is done in a drawn order, so that a wait that is missing gives wrong numbers.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class QueuedDevice:
    """Takes the place of `torch.cuda`'s streams and events.

    Attributes:
        host_reads: how often the host waited for a number.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
        self.host_reads = 0
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._current = threading.local()
        self._streams: list[QueuedStream] = []
        self._default = self.new_stream()
        for name, substitute in {
            "Stream": lambda device=None: self.new_stream(),
            "Event": lambda: QueuedEvent(self),
            "current_stream": lambda device=None: self.current,
            "stream": self.on,
        }.items():
            monkeypatch.setattr(torch.cuda, name, substitute)

    @property
    def current(self) -> "QueuedStream":
        stream: QueuedStream = getattr(self._current, "stream", self._default)
        return stream

    @property
    def busy_streams(self) -> int:
        """Streams with work that was called and is not done."""
        return sum(1 for stream in self._streams if stream.queue)

    def new_stream(self) -> "QueuedStream":
        with self._lock:
            self._streams.append(QueuedStream())
            return self._streams[-1]

    @contextmanager
    def on(self, stream: "QueuedStream") -> Iterator[None]:
        """On this thread, what is called in here goes to `stream`."""
        before, self._current.stream = self.current, stream
        try:
            yield
        finally:
            self._current.stream = before

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """On this thread, operations on tensors that are called in here are queued."""
        with _Queueing(self):
            yield

    def call(self, work: Callable[[], object]) -> None:
        """Queue it on the current stream."""
        with self._lock:
            self.current.queue.append(("work", work))

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Do what was called, all of it or until something holds."""
        with self._lock, torch.no_grad(), _disable_current_modes():
            while self.busy_streams if until is None else not until():
                ready = [stream for stream in self._streams if stream.ready]
                assert ready, "streams wait for each other"
                self._random.choice(ready).step()

    def read_by_host(self) -> None:
        """The host waits for the current stream."""
        self.host_reads += 1
        self.run(lambda: not self.current.queue)


class QueuedStream:
    def __init__(self) -> None:
        self.queue: deque[tuple[str, Any]] = deque()

    @property
    def ready(self) -> bool:
        return bool(self.queue) and (self.queue[0][0] != "wait" or self.queue[0][1].is_set())

    def step(self) -> None:
        kind, what = self.queue.popleft()
        if kind == "record":
            what.set()
        elif kind == "work":
            what()

    def wait_event(self, event: "QueuedEvent") -> None:
        if event.latest is not None:
            self.queue.append(("wait", event.latest))

    def wait_stream(self, stream: "QueuedStream") -> None:
        reached = threading.Event()
        stream.queue.append(("record", reached))
        self.queue.append(("wait", reached))


class QueuedEvent:
    def __init__(self, device: QueuedDevice) -> None:
        self.latest: threading.Event | None = None
        self._device = device

    def record(self, stream: QueuedStream) -> None:
        self.latest = threading.Event()
        stream.queue.append(("record", self.latest))

    def synchronize(self) -> None:
        if self.latest is not None:
            self._device.run(self.latest.is_set)


class _Queueing(TorchDispatchMode):
    """What only makes memory or a view of it happens at once; other results get their numbers when their turn comes."""

    def __init__(self, device: QueuedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):  # not without a GPU
            kwargs["pin_memory"] = False
        if func is torch.ops.aten._local_scalar_dense.default:
            self._device.read_by_host()
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._device.call(lambda: func(*args, **kwargs))
            return args[0] if isinstance(args[0], Tensor) else None
        result = func(*args, **kwargs)
        reads = any(isinstance(argument, (Tensor, list)) for argument in args)
        if isinstance(result, Tensor) and reads and not func.is_view:
            self._device.call(lambda: result.copy_(func(*args, **kwargs)))
        return result
