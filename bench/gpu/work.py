"""What an item is given in its process: which lines are wanted, how one is measured, and what it may take."""

import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from reporting.reasons import Skip, without_paths
from reporting.settings import ON_GPU, TINY, Settings

from gpu.lines import Line, line_of

RESTART = 75  # exit status: the device is lost to this process, and lines are left
Attention = Literal["fast", "mixed", "named", "none"]
SLOW = "buckets"  # the attention that must not be measured in place of a fast one


@dataclass(frozen=True)
class Prediction:
    """What was predicted before anything ran.

    Attributes:
        value: in the unit of the line, or a ratio where `of` says so.
        source: from what it was derived.
        bound: "memory" where it goes with the bandwidth of the device, else "products" or "".
        of: the field of the line that it stands for.
        device: for which it was made.
    """

    value: float
    source: str
    bound: str = ""
    of: str = "value"
    device: str = "H100"


@dataclass
class Found:
    """What one measurement found; the fields are those of `gpu.lines.line_of`, `more` is kept beside them."""

    value: float | None
    unit: str
    limit: str | None = None
    share_of_limit: float | None = None
    baseline: str | None = None
    speedup: float | None = None
    backend: str | None = None
    prediction: Prediction | None = None
    failure: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """What the scheduler asks of an item's process.

    Attributes:
        names: of the lines that are missing.
        seconds: until it is killed.
        rehearse: on a CPU, in small, without figures.
        folder: for files that nobody keeps.
        known: lines of this run so far.
    """

    item: int
    names: list[str]
    seconds: float
    rehearse: bool
    folder: str
    known: list[Line]


class Work:
    """One item at work; `send` takes its messages to the scheduler: {"start": name} and {"line": {...}}."""

    def __init__(self, order: Order, send: Callable[[Mapping[str, Any]], None]) -> None:
        self.order, self._send = order, send
        self.rehearse, self.folder = order.rehearse, Path(order.folder)
        self._wanted = dict.fromkeys(order.names)
        self._end = monotonic() + order.seconds

    @property
    def left_s(self) -> float:
        """Seconds until the process is killed."""
        return max(0.0, self._end - monotonic())

    @property
    def wanted(self) -> list[str]:
        """Names without a line, in the order of the item."""
        return list(self._wanted)

    def start(self, name: str) -> float:
        """Tell that a line is being measured; the moment."""
        self._send({"start": name})
        return monotonic()

    def measure(self, name: str, function: Callable[[], Found], *, attention: Attention = "fast") -> None:
        """Make the line `name` if it is wanted: what `function` found, or why it did not.

        Args:
            attention: which backend of packed attention may run on a GPU for the figure to count: "fast" = no buckets,
                "mixed" = buckets in float32 alone (the frozen recommender's), "named" = any, the line says which,
                "none" = not looked at.
        """
        if name not in self._wanted:
            return
        start = self.start(name)
        with nullcontext(Counter[str]()) if attention == "none" else recorded_attention() as counts:
            try:
                found, status = function(), "ok"
            except Exception as error:
                traceback.print_exc()
                found, status = Found(None, ""), status_of(error)
            except BaseException as error:  # pytest's Skipped is none of the above
                if type(error).__name__ != "Skipped":
                    raise
                found, status = Found(None, ""), f"skipped: {first_line(error)}"
        self.finish(name, found, status, start, attention=attention, counts=counts)

    def finish(
        self, name: str, found: Found, status: str, start: float, *, attention: Attention = "none", counts: Counter[str]
    ) -> None:
        """Send the line of a measurement that has ended.

        Args:
            start: what `start` gave.
            attention: see `measure`.
            counts: calls of packed attention by backend.
        """
        del self._wanted[name]
        if status == "ok" and found.failure:
            status = f"failed: {found.failure}"
        if counts and found.backend is None:
            found.backend = ", ".join(f"{backend} x {calls}" for backend, calls in sorted(counts.items()))
        allowed = f"{SLOW}, float32" if attention == "mixed" else None
        looked_at = attention in ("fast", "mixed")
        slow = looked_at and any(name.startswith(SLOW) and name != allowed for name in counts)
        if status == "ok" and slow and not self.rehearse:
            status = f"failed: attention ran in {SLOW}"
        self._send({"line": _line(self.order, name, found, status, monotonic() - start)})
        if status.startswith("failed") and device_is_lost():
            sys.stdout.flush()
            os._exit(RESTART)  # pytest would catch a SystemExit, and go on without a device

    @cached_property
    def context(self) -> Any:
        """A `reporting.context.Context` with the roofs of this run, where they were measured."""
        import torch
        from reporting.context import Context
        from roofline import Roofs

        # with its number: the bound of memory of a process is not set for a device without one
        device = torch.device("cpu") if self.rehearse else torch.device("cuda", 0)
        values = {line["name"]: line["value"] for line in self.order.known if line["status"] == "ok"}
        rates = {name.split()[-1]: value for name, value in values.items() if name.startswith("roof: product")}
        known = Roofs(values["roof: copy"], rates) if "roof: copy" in values and rates else None
        return Context(device, self.settings, self.folder, known)

    @property
    def settings(self) -> Settings:
        """Sizes of the report, on a GPU, or the smallest for a rehearsal."""
        return TINY if self.rehearse else ON_GPU


def against_strongest(found: Found, speedups: Mapping[str, float]) -> Found:
    """With the strongest of the other forms: the one that ours is the least faster than."""
    if speedups:
        found.baseline, found.speedup = min(speedups.items(), key=lambda pair: pair[1])
    return found


def _line(order: Order, name: str, found: Found, status: str, seconds: float) -> Line:
    facts = asdict(found)
    more, _ = facts.pop("more"), facts.pop("failure")
    if order.rehearse:
        facts = {key: None if isinstance(value, float | int) else value for key, value in facts.items()}
        more, status = {"rehearsal": True}, "rehearsed" if status == "ok" else status
    elif not all(math.isfinite(facts[key] or 0) for key in ("value", "share_of_limit", "speedup")):
        facts |= {"value": None, "share_of_limit": None, "speedup": None}
        status = "failed: the result is no finite number"
    return line_of(order.item, name, status, **facts, **more) | {"seconds": round(seconds, 2)}


def recorded_attention() -> AbstractContextManager[Counter[str]]:
    """Counts calls of packed attention by backend and dtype while it is open."""
    from laser_fast.lm.attention.packed_attention import record_backends  # the library takes seconds to import

    return record_backends()


def first_line(error: BaseException) -> str:
    """What an error says, in a line without the paths of the machine."""
    said = str(error).strip().splitlines()
    return without_paths(said[0] if said else "no message")


def status_of(error: Exception) -> str:
    """The status of a line whose measurement raised this."""
    if isinstance(error, Skip):
        return f"skipped: {first_line(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("laser_fast"):
        return f"skipped: no {error.name.partition('.')[0]}"
    return f"failed: {type(error).__name__}: {first_line(error)}"


def device_is_lost() -> bool:
    """Whether an error of CUDA has made the context of this process useless."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False
