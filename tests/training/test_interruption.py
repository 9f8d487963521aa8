"""Signals while training: the first is taken note of, a second acts as always, other threads see nothing of it."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from laser_fast.training.interruption import Interruption


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """Ctrl-C as Python has it, where the tests themselves were started in the background, with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_as_always(in_the_foreground: None) -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_leave_the_handlers_alone() -> None:
    handlers: list[Any] = []

    def enter() -> None:
        with Interruption() as interruption:
            interruption.check()
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
