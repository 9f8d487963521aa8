"""Bars on the standard error that tell how far `prepare` is; none where that is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from laser_fast.data.readers.streams import Source, WatchedSource


@contextmanager
def reading_bar(source: Source, progress: bool) -> Iterator[Source]:
    """Give a source to read instead of `source`: a bar shows how many of its bytes are read."""
    size = source.stat().st_size if isinstance(source, Path) else None
    bar = tqdm(total=size, desc="read log", unit="B", unit_scale=True, disable=None if progress else True)
    with bar:
        if bar.disable or isinstance(source, WatchedSource):
            yield source
        else:
            # a file is begun anew for its header, so the bar waits until the rows are further
            yield WatchedSource(source, lambda done: bar.update(max(done - bar.n, 0)))


@contextmanager
def ordering_bar(num_events: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """Give what takes the number of events put in order since it was last called."""
    with tqdm(
        total=num_events, desc="order", unit=" events", unit_scale=True, disable=None if progress else True
    ) as bar:
        yield bar.update
