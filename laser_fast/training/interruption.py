"""SIGTERM and Ctrl-C while training: the running step is finished first, a second signal acts as it always does.

A signal to one of several processes stops all: they ask each other at the same places.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from laser_fast.processes import ALONE, Processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """Training stopped because of `signal`. Like KeyboardInterrupt, this is no error for `except Exception`."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"training was stopped by {self.signal.name}; resume goes on from the last state")

    @property
    def exit_status(self) -> int:
        """What a shell expects when a signal ended a process: 143 or 130."""
        return 128 + self.signal


class Interruption:
    """While entered, takes note of the first SIGTERM or SIGINT; after that the earlier handlers are back.

    Outside the main thread, where Python allows no handlers, nothing is changed. Processes that stop together use
    `requested`, `check`, `poll` and `at_once` at the same places.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self._number: int | None = None
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    @property
    def requested(self) -> int:
        """The signal that came to any process, the largest of several; 0 for none."""
        return self.processes.largest(self._number or 0)

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if number := self.requested:
            raise Interrupted(number)

    def poll(self) -> None:
        """`check` within the `at_once` of several processes; a single process needs none."""
        if self.processes.size > 1 and self._at_once:
            self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that can be thrown away: a signal ends it anywhere, by `Interrupted`.

        Several processes end it at the next `poll`, because one that stops elsewhere would leave the others waiting.
        """
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False
        self.check()  # one that came in a place where Python drops exceptions

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._put_back()
        if self._at_once and self.processes.size == 1:
            raise Interrupted(number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
