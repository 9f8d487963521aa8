"""Events as they are read: flat records, and the type of the times, which only the whole log decides."""

import numpy as np

_EXACT_FLOAT = 2**53  # float64 holds every whole number up to here


def event_type(times: np.dtype | str) -> np.dtype:
    """Records of 16 bytes: `user` and `item` as int32, `time` as int64 or float64."""
    return np.dtype([("user", "<i4"), ("item", "<i4"), ("time", np.dtype(times).newbyteorder("<"))])


class TimeType:
    """int64 if all times of a log are whole numbers ("978300760.0" is one too), else float64."""

    def __init__(self) -> None:
        self._floats = False
        self._whole = True

    def add(self, times: np.ndarray) -> None:
        """Take the times of some more events, int64 or float64."""
        self._floats |= times.dtype.kind == "f"
        exact = times.astype(np.float64)
        self._whole &= bool(((np.abs(exact) <= _EXACT_FLOAT) & (exact == np.floor(exact))).all())

    @property
    def dtype(self) -> np.dtype:
        """The type of all times added."""
        return np.dtype(np.float64 if self._floats and not self._whole else np.int64)

    def of(self, times: np.ndarray) -> np.ndarray:
        """`times`, which were added, in the type of all."""
        # a log with any float is one of floats: what float64 cannot hold is rounded wherever it stands
        return (times.astype(np.float64) if self._floats else times).astype(self.dtype)
