"""`prepare` killed at random moments: afterwards the complete folder or none, and nothing lies about after the next."""

import os
import random
import secrets
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from laser_fast.data import PrepareRequest, SequenceDataset, prepare
from laser_fast.files import atomic
from laser_fast.files.atomic import _locked, remove_leftovers, replace_directory

KILLS = 20
SEED = 7
# one warm process forks a child for every line "TIE_RULE SECONDS" and kills it after so many seconds (never below 0)
KILLER = """
import os, signal, sys, time
from pathlib import Path
from laser_fast.data import PrepareRequest, prepare
from laser_fast.files import atomic
atomic.sync = lambda path: None  # a killed process leaves its files to the system, synced or not
for line in sys.stdin:
    rule, seconds = line.split()[0], float(line.split()[1])
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            prepare(PrepareRequest(Path(sys.argv[2]), interactions=Path(sys.argv[1]), tie_rule=rule, overwrite=True))
        finally:
            os._exit(0)
    if seconds >= 0:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(time.perf_counter() - begin, flush=True)
"""


@pytest.fixture
def request_(tmp_path: Path) -> PrepareRequest:
    rows = "".join(f"u{event // 29},i{event % 5},{event // 3}\n" for event in range(200))
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + rows)
    return PrepareRequest(tmp_path / "out", interactions=tmp_path / "log.csv", overwrite=True)


def test_killed_at_random_moments(request_: PrepareRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    out, log = request_.out, request_.interactions
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KILLER, str(log), str(out)]
    rng, seen, rules = random.Random(SEED), Counter[str](), ("hash:1", "file-order")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes) as killer:

        def run(rule: str, seconds: float) -> float:
            print(rule, seconds, file=killer.stdin, flush=True)
            assert killer.stdout is not None
            return float(killer.stdout.readline())

        durations = [run(rules[turn % 2], -1) for turn in range(6)]
        kept = shutil.copytree(out, out.with_name("kept"))  # made by the second rule
        shutil.rmtree(out)
        run(rules[0], -1)
        hashes = [SequenceDataset.load(out).hash(), SequenceDataset.load(kept).hash()]
        assert hashes[0] != hashes[1]
        for kill in range(KILLS):
            fresh = kill % 2 == 0  # no folder before, or one made by the other rule
            shutil.rmtree(out, ignore_errors=True)
            if not fresh:
                shutil.copytree(kept, out)
            moment = rng.uniform(0, 1.1) * statistics.median(durations)
            run(rules[0], moment)
            told = f"seed {SEED}, kill {kill} after {moment * 1e3:.1f} ms"
            try:
                found = SequenceDataset.load(out).hash()
            except FileNotFoundError:
                assert fresh, told  # a data set that was there is never lost
                found = ""
            assert found in {*hashes, ""}, told
            seen["complete" if found == hashes[0] else "as before"] += 1
            seen["with leftovers"] += any(path.name.endswith(".partial") for path in out.parent.iterdir())
        assert killer.stdin is not None
        killer.stdin.close()
    print(f"seed {SEED}, {dict(seen)}, one run {statistics.median(durations) * 1e3:.1f} ms")
    assert seen["as before"] > 0
    monkeypatch.setattr(atomic, "sync", lambda path: None)
    assert prepare(replace(request_, tie_rule="hash:1")).hash() == hashes[0]
    assert sorted(path.name for path in out.parent.iterdir()) == ["kept", "log.csv", "out"]


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
    request_.out.rename(request_.out.with_name(".out.0123456789ab.old"))  # as a death between the two renames leaves it
    said: list[str] = []
    assert prepare(request_, say=said.append).hash() == dataset.hash()
    assert "nothing written" in said[0]
    assert sorted(path.name for path in request_.out.parent.iterdir()) == ["log.csv", "out"]
