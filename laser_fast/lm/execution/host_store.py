"""Tensors that wait for backward in host memory, copied there and back beside the computation."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class _Stored:
    """One tensor away from its device, and the one that was put before it while backward wants it."""

    host: Tensor | None  # None for a tensor on the meta device
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    before: "weakref.ref[_Stored] | None"
    fetched: Tensor | None = None


class HostStore:
    """The two hooks of `saved_tensors_hooks`: `put` copies to pinned host memory, `get` brings back.

    Copies run on a stream of their own, one at a time. Backward asks in the opposite order of forward, so `get` also
    starts the copy of the tensor that was put before. Tensors in host memory stay; the meta device counts as a GPU.

    The computation waits for a copy before the next one starts, a layer later, and what was copied is held until then.
    So the device holds at most two of the tensors, however far the host runs ahead. `record_stream` would keep memory
    until the host sees that a copy is done, in a slow step the memory of all layers. The graph alone holds what is
    away, so a step that is given up leaves nothing behind but the running copy.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[_Stored] | None = None
        self._running: tuple[Tensor, torch.cuda.Event | None] | None = None  # what is read or written, until when

    def put(self, tensor: Tensor) -> "Tensor | _Stored":
        """Start the copy to the host; the tensor itself may be freed at once."""
        if not self._leaves(tensor):
            return tensor
        tensor = tensor.detach()  # its graph would hold what is away
        # torch reuses pinned memory, and not before copies of it are done
        host = None if tensor.is_meta else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy(host, tensor, on_device=tensor)
        stored = _Stored(host, tensor.shape, tensor.dtype, tensor.device, self._last)
        self._last = weakref.ref(stored)
        return stored

    def get(self, stored: "Tensor | _Stored") -> Tensor:
        """The tensor on its device again."""
        if isinstance(stored, Tensor):
            return stored
        self._last = None  # the next forward starts another chain
        tensor = self._fetch(stored)
        self._wait()
        stored.fetched = None
        before = None if stored.before is None else stored.before()
        if before is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, stored: _Stored) -> Tensor:
        if stored.fetched is None:
            # allocated on the computation's stream, for which the copy waits
            stored.fetched = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
            self._copy(stored.fetched, stored.host, on_device=stored.fetched)
        return stored.fetched

    def _copy(self, target: Tensor | None, source: Tensor | None, *, on_device: Tensor) -> None:
        """Start a copy behind all that the computation was given so far."""
        self._wait()
        done = None
        if target is not None and source is not None:
            if self._stream is None:
                self._stream = torch.cuda.Stream(on_device.device)
            self._stream.wait_stream(torch.cuda.current_stream(on_device.device))
            done = torch.cuda.Event()
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
                done.record(self._stream)
        self._running = (on_device, done)

    def _wait(self) -> None:
        """Let the computation wait for the running copy, so that it may write and free what is copied."""
        if self._running is not None:
            tensor, done = self._running
            if done is not None:
                torch.cuda.current_stream(tensor.device).wait_event(done)
            self._running = None

    @staticmethod
    def _leaves(tensor: Tensor) -> bool:
        return tensor.is_cuda or tensor.is_meta
