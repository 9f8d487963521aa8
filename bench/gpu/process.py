"""An item in a process of its own: started, listened to, and ended with all that it started when its time is over."""

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

from gpu.work import RESTART, Order, Work

Message = dict[str, Any]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# how long a process may take to come to its first line: imports, and a model of 8B weights
_START_S = 60.0


class Ended(Exception):
    """The process is gone before its item was done; the message says why.

    Attributes:
        name: of the line that was being measured, if any.
        cut: whether its time was over, else it failed.
    """

    def __init__(self, reason: str, name: str | None, *, cut: bool = False) -> None:
        super().__init__(reason)
        self.name, self.cut = name, cut


def carry_out(
    items: str, order: Order, line_s: float, log: Path, environment: Mapping[str, str], take: Callable[[Message], None]
) -> None:
    """Run an item until it is done.

    Args:
        items: module that has `ITEMS`.
        line_s: seconds that one line may take.
        log: gets what the process prints.
        take: is given every line the moment it arrives.

    Raises:
        Ended: before it was done; the device being lost with lines left is no error, the caller starts it again.
    """
    process, messages = _start(items, order, log, environment)
    end, name, line_end = monotonic() + order.seconds, None, monotonic() + _START_S
    try:
        for message in _messages(messages, lambda: min(end, line_end)):
            if message is None:
                limit = order.seconds if end <= line_end else line_s if name else _START_S
                raise Ended(f"over the limit of {limit:.3g} s", name, cut=True)
            if "start" in message:
                name, line_end = message["start"], monotonic() + line_s
            else:
                take(message["line"])
                name, line_end = None, monotonic() + max(line_s, _START_S)
        status = process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it started and left behind
        process.wait()
        os.close(messages)
    if status not in (0, RESTART):
        raise Ended(_reason(status, log), name)


def _start(items: str, order: Order, log: Path, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    reading, writing = os.pipe()
    with log.open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu.process", items, str(writing), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            pass_fds=(writing,),
            env=dict(environment),
            start_new_session=True,
        )
    os.close(writing)
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as stdin:  # it may be dead already; its status says so
        stdin.write(json.dumps(asdict(order)).encode())
    return process, reading


def _messages(descriptor: int, until: Callable[[], float]) -> Iterator[Message | None]:
    """What arrives, until the other side is closed; None when the moment `until()` has passed."""
    rest = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, until() - monotonic()))
        if not ready:
            yield None
            return
        data = os.read(descriptor, 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield json.loads(line)


def _reason(status: int, log: Path) -> str:
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
    return f"the process ended with status {status}: {said[-1]}"


def _die_with(parent: int) -> None:
    """End this process when that one is killed: otherwise it would go on using the device."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main(items: str, descriptor: int, parent: int) -> None:
    """Carry out the order on stdin, telling of every line on an open file descriptor."""
    _die_with(parent)
    os.set_inheritable(descriptor, False)
    order = Order(**json.load(sys.stdin))
    (item,) = [item for item in importlib.import_module(items).ITEMS if item.number == order.item]

    def send(message: Mapping[str, Any]) -> None:
        data = (json.dumps(message, allow_nan=False) + "\n").encode()
        while data:
            data = data[os.write(descriptor, data) :]

    item.run(Work(order, send))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
