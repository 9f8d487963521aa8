"""Tensors that wait for their backward in host memory, copied there and back beside the computation."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Stored:
    """One tensor away from its device; `fetched` once the copy back was started."""

    host: Tensor
    device: torch.device
    written: torch.cuda.Event
    before: "_Stored | None"
    fetched: Tensor | None = None
    arrived: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Shape:
    """A tensor without values that is away."""

    shape: torch.Size
    dtype: torch.dtype


class HostStore:
    """The two hooks of `saved_tensors_hooks`: `put` copies to pinned host memory, `get` brings back.

    Copies run on a stream of their own. Backward asks in the opposite order of forward, so `get` also starts the copy
    of the tensor that was put before. A tensor that is in host memory already stays as it is; one on the
    meta device goes as if that were a GPU.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: _Stored | None = None

    def put(self, tensor: Tensor) -> "Tensor | _Stored | _Shape":
        """Start the copy to the host; the tensor itself may be freed at once."""
        if tensor.is_meta:
            return _Shape(tensor.shape, tensor.dtype)
        if not tensor.is_cuda:
            return tensor
        stream = self._copies(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
            written = torch.cuda.Event()
            written.record(stream)
        tensor.record_stream(stream)
        self._last = _Stored(host, tensor.device, written, self._last)
        return self._last

    def get(self, stored: "Tensor | _Stored | _Shape") -> Tensor:
        """The tensor on its device again."""
        if isinstance(stored, _Shape):
            return torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        if isinstance(stored, Tensor):
            return stored
        self._last = None  # the next forward starts a chain of its own
        self._fetch(stored)
        assert stored.fetched is not None and stored.arrived is not None
        current = torch.cuda.current_stream(stored.device)
        current.wait_event(stored.arrived)
        tensor = stored.fetched
        tensor.record_stream(current)
        before, stored.before, stored.fetched = stored.before, None, None
        if before is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, stored: _Stored) -> None:
        if stored.fetched is not None:
            return
        stream = self._copies(stored.device)
        with torch.cuda.stream(stream):
            stream.wait_event(stored.written)
            stored.fetched = stored.host.to(stored.device, non_blocking=True)
            stored.arrived = torch.cuda.Event()
            stored.arrived.record(stream)

    def _copies(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream
