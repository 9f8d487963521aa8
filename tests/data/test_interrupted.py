"""`prepare` killed at random moments: afterwards the complete folder or none, and nothing lies about after the next."""

import multiprocessing
import random
import secrets
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from laser_fast.data import PrepareRequest, SequenceDataset, prepare
from laser_fast.data.folders import _locked, remove_leftovers, replace_directory

KILLS = 50
SEED = 7


@pytest.fixture
def request_(tmp_path: Path) -> PrepareRequest:
    rows = "".join(f"u{event % 7},i{event % 5},{event}\n" for event in range(200))
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + rows)
    return PrepareRequest(tmp_path / "out", interactions=tmp_path / "log.csv", overwrite=True)


def test_killed_at_fifty_random_moments(request_: PrepareRequest) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["laser_fast.data"])

    def started(request: PrepareRequest) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=prepare, args=(request,), daemon=True)
        process.start()
        return process

    recipes = [request_, replace(request_, tie_rule="hash:1", max_history=9)]
    hashes, durations = [], []
    for turn in range(6):
        begin = time.perf_counter()
        started(recipes[turn % 2]).join()
        durations.append(time.perf_counter() - begin)
        hashes.append(SequenceDataset.load(request_.out).hash())
    whole, rng, seen = set(hashes), random.Random(SEED), Counter[str]()
    assert len(whole) == 2
    for kill in range(KILLS):
        fresh = kill % 2 == 0  # no folder before, or one made by the other recipe
        if fresh:
            prepare(request_)
            for file in request_.out.iterdir():
                file.unlink()
            request_.out.rmdir()
        before = None if fresh else prepare(request_).hash()
        moment = rng.uniform(0, 1.1) * statistics.median(durations[1:])
        process = started(recipes[1])
        time.sleep(moment)
        process.kill()
        process.join()
        told = f"seed {SEED}, kill {kill} after {moment * 1e3:.1f} ms"
        try:
            found = SequenceDataset.load(request_.out).hash()
        except FileNotFoundError:
            assert before is None, told  # a data set that was there is never lost
            found = ""
        assert found in {*whole, ""} and (found in whole or fresh), told
        seen["complete" if found == hashes[1] else "as before"] += 1
        seen["leftovers"] += any(path.name.endswith(".partial") for path in request_.out.parent.iterdir())
    print(seen)
    assert seen["as before"] > 0
    assert prepare(request_).hash() == hashes[0]
    assert sorted(path.name for path in request_.out.parent.iterdir()) == ["log.csv", "out"]


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    names = [f".out.{secrets.token_hex(6)}.partial" for _ in range(2)]
    for name in (*names, ".out.short.partial", ".outer.0123456789ab.partial"):
        (tmp_path / name).mkdir()
    alive = _locked(tmp_path / names[0])
    assert alive is not None
    remove_leftovers(target)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == sorted([names[0], ".out.short.partial", ".outer.0123456789ab.partial"])
    with replace_directory(target) as fresh:
        remove_leftovers(target)  # while this one writes
        (fresh / "file").write_text("x")
    assert (target / "file").read_text() == "x"


def test_a_folder_that_lost_its_name_gets_it_back(request_: PrepareRequest) -> None:
    dataset = prepare(request_)
    request_.out.rename(request_.out.with_name("out.old"))  # as a death between the two renames leaves it
    said: list[str] = []
    assert prepare(request_, say=said.append).hash() == dataset.hash()
    assert "nothing written" in said[0]
    assert sorted(path.name for path in request_.out.parent.iterdir()) == ["log.csv", "out"]
