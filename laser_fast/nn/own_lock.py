"""A lock that belongs to one object: a copy of the object gets its own."""

import threading
from typing import Any


class OwnLock:
    """A `threading.Lock` that may be copied and pickled with the object that it guards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnLock, ()
