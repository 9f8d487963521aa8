"""A lock that belongs to one object: copies of the object get one of their own."""

import threading
from typing import Any


class OwnLock:
    """`with lock:` as `threading.Lock`, which could not be copied or pickled together with what it guards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnLock, ()
