"""The pool of prefixes: what is kept, what is evicted, and that nothing stale is ever served."""

import copy
import random
import time
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

from laser_fast.lm.execution.cuda_graphs import CudaGraphs
from laser_fast.lm.key_value_prefix import KeyValuePrefix
from laser_fast.ops import inject_prefix_kv
from laser_fast.retrieval.prefix_store import PrefixStore

from ..queued_device import QueuedDevice

LAYERS = 2


def of_layer(prefix: KeyValuePrefix, layer: int) -> list[torch.Tensor]:
    """Keys and values of one layer, a row for each name."""
    both = prefix.keys[layer].float(), prefix.values[layer].float()
    return [rows if prefix.slots is None else rows[prefix.slots] for rows in both]


class Writer:
    """Writes a prefix that says which name and which version it was made for, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.version = 0

    def fetch(self, store: PrefixStore, names: list[str]) -> list[float]:
        def write(positions: list[int]) -> KeyValuePrefix:
            self.asked.append([names[position] for position in positions])
            marks = torch.tensor([ord(names[position]) + 1000.0 * self.version for position in positions])
            rows = marks.view(-1, 1, 1, 1).expand(-1, 3, 2, 4)
            return KeyValuePrefix((rows, rows + 0.25), (rows + 0.5, rows + 0.75))

        versions: Hashable = ("weights", self.version)
        with store.fetch(names, versions, write) as got:
            for layer in range(LAYERS):
                key, value = of_layer(got, layer)
                assert key.shape == value.shape == (len(names), 3, 2, 4)
                torch.testing.assert_close(key + 0.5, value)
            assert got.batch_size == len(names) and got.length == 3
            return [float(mark) for mark in of_layer(got, 0)[0][:, 0, 0, 0]]


def marks(names: str, version: int = 0) -> list[float]:
    return [ord(name) + 1000.0 * version for name in names]


def test_each_name_is_written_once_and_served_in_order() -> None:
    store, writer = PrefixStore(4), Writer()
    assert writer.fetch(store, list("abab")) == marks("abab")
    assert writer.fetch(store, list("bca")) == marks("bca")
    assert writer.asked == [["a", "b"], ["c"]]
    assert (len(store), store.hits, store.misses) == (3, 4, 3)


def test_the_longest_unused_goes_first_and_never_one_of_the_batch() -> None:
    store, writer = PrefixStore(3), Writer()
    for names in ("abc", "a", "d", "acd", "be"):
        assert writer.fetch(store, list(names)) == marks(names)
    # d took the slot of b, b and e those of a and c
    assert writer.asked == [["a", "b", "c"], ["d"], ["b", "e"]]
    assert writer.fetch(store, list("d")) == marks("d")
    assert len(writer.asked) == 3


def test_another_version_of_the_weights_empties_it() -> None:
    store, writer = PrefixStore(4), Writer()
    writer.fetch(store, list("ab"))
    writer.version = 1
    assert writer.fetch(store, list("xa")) == marks("xa", version=1)
    assert writer.asked == [["a", "b"], ["x", "a"]]


def test_a_batch_larger_than_the_pool_is_written_and_not_kept() -> None:
    store, writer = PrefixStore(2), Writer()
    writer.fetch(store, list("a"))
    assert writer.fetch(store, list("cbdc")) == marks("cbdc")
    assert writer.fetch(store, list("a")) == marks("a")
    assert writer.asked == [["a"], ["c", "b", "d", "c"]]


def test_memory_is_bounded_by_the_capacity() -> None:
    store, writer = PrefixStore(5), Writer()
    assert store._pool.tensors == ()
    for start in range(0, 50, 5):
        writer.fetch(store, [chr(65 + start + i) for i in range(5)])
    assert len(store) == 5
    assert [tensor.shape for tensor in store._pool.tensors] == 2 * LAYERS * [(5, 3, 2, 4)]


def test_capacity_is_checked() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        PrefixStore(0)


def test_a_pool_is_injected_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    store, writer = PrefixStore(4), Writer()
    writer.fetch(store, list("abc"))

    def refuse(positions: list[int]) -> KeyValuePrefix:
        raise AssertionError(positions)

    with store.fetch(list("ca"), ("weights", 0), refuse) as got:
        pass
    seen: list[int] = []

    def recorded(*tensors: torch.Tensor, prefix_index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.extend(tensor.data_ptr() for tensor in tensors[2:4])
        return inject_prefix_kv(*tensors, prefix_index=prefix_index)

    monkeypatch.setattr("laser_fast.lm.key_value_prefix.inject_prefix_kv", recorded)
    text, cu_seqlens = torch.zeros(3, 2, 4), torch.tensor([0, 1, 3], dtype=torch.int32)
    key, value = got.inject(1, text, text, cu_seqlens)
    assert seen == [got.keys[1].data_ptr(), got.values[1].data_ptr()]  # no copy of the prefixes of the batch
    rows = of_layer(got, 1)
    assert all(torch.equal(out[:3], prefix[0]) for out, prefix in zip((key, value), rows, strict=True))
    assert all(torch.equal(out[4:7], prefix[1]) for out, prefix in zip((key, value), rows, strict=True))
    one = replace(got, slots=got.slots[:1])
    assert torch.equal(one.inject(0, text, text, cu_seqlens)[0][4:7], got.keys[0][int(got.slots[0])])


def test_what_is_read_is_not_overwritten() -> None:
    store, writer = PrefixStore(2), Writer()
    with store.fetch(list("ab"), ("weights", 0), lambda positions: prefix_of("ab", positions)) as held:
        assert writer.fetch(store, list("c")) == marks("c")  # no slot is free: written for this batch
        assert writer.fetch(store, list("bc")) == marks("bc")
        writer.version = 1
        assert writer.fetch(store, list("a")) == marks("a", version=1)
        assert first_keys(held) == marks("ab")
    writer.asked.clear()
    for _ in range(2):
        assert writer.fetch(store, list("cd")) == marks("cd", version=1)
    assert writer.asked == [["c", "d"]]


def test_a_failed_write_or_read_leaves_nothing_held() -> None:
    store, writer = PrefixStore(1), Writer()

    def fail(positions: list[int]) -> KeyValuePrefix:
        raise ZeroDivisionError

    for version in range(3):
        with pytest.raises(ZeroDivisionError), store.fetch(["x"], version, fail):
            pass
        with pytest.raises(ZeroDivisionError), store.fetch(["a"], version, lambda at: prefix_of("a", at)):
            raise ZeroDivisionError
    assert writer.fetch(store, list("b")) == marks("b") and len(store) == 1


def test_prefixes_of_another_form_get_a_pool_of_their_own() -> None:
    store, writer = PrefixStore(3), Writer()
    writer.fetch(store, list("ab"))
    for _ in range(2):
        with store.fetch(list("xa"), "half", lambda at: prefix_of("xa", at, torch.float16)) as got:
            assert got.keys[0].dtype == torch.float16 and first_keys(got) == marks("xa")
    assert len(store) == 2
    store.clear()
    assert (len(store), store._pool.tensors) == (0, ())
    assert (copy.deepcopy(store).capacity, len(copy.deepcopy(store))) == (3, 0)


def test_threads_get_what_they_asked_for() -> None:
    store, wrong = PrefixStore(4), []

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        for step in range(200):
            names = "".join(draw.choices("abcdefgh", k=draw.randint(1, 3)))
            version = step // 50
            with store.fetch(list(names), version, partial(prefix_of, names)) as got:
                time.sleep(0)
                if first_keys(got) != marks(names):
                    wrong.append(names)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert not wrong and len(store) <= 4 and store.hits > 0
    assert not store._pool._pins


def prefix_of(names: str, positions: list[int], dtype: torch.dtype = torch.float32) -> KeyValuePrefix:
    values = torch.tensor([float(ord(names[position])) for position in positions], dtype=dtype)
    rows = values.view(-1, 1, 1, 1).expand(-1, 3, 2, 4)
    return KeyValuePrefix((rows, rows), (rows, rows))


def first_keys(prefix: KeyValuePrefix) -> list[float]:
    return [float(mark) for mark in of_layer(prefix, 0)[0][:, 0, 0, 0]]


@pytest.mark.parametrize("ordered", [True, False], ids=["in turn", "without events"])
def test_streams_read_what_was_written_for_them(monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    wrong = 0
    for seed in range(20):
        device = QueuedDevice(monkeypatch, seed)
        streams = [device.new_stream() for _ in range(3)]
        if ordered:
            monkeypatch.setattr("laser_fast.retrieval.prefix_store.Recorder", lambda: CudaGraphs(torch.device("cpu")))
        store, read = PrefixStore(2), []
        for step, names in enumerate(["a", "bc", "c", "da", "a", "bd", "c"]):
            write = partial(prefix_of, names)
            with device.on(streams[step % 3]), device.queueing(), store.fetch(list(names), 0, write) as got:
                read.append((names, of_layer(got, 0)[0]))
        device.run()
        wrong += any([float(mark) for mark in keys[:, 0, 0, 0]] != marks(names) for names, keys in read)
    assert (wrong == 0) == ordered
