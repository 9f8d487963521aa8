"""The run on a GPU: it loses no line but the one being measured, no item stops another, nothing is glossed over."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nvidia_smi
import pytest
from gpu import machine
from gpu.items import ITEMS
from gpu.items.waterfall import names as waterfall_names
from gpu.lines import Lines, latest, line_of
from gpu.run import _numbers
from gpu.table import tables
from gpu.testing import evenly
from gpu.work import Found, Order, Prediction, Work, status_of

BENCH = Path(__file__).resolve().parents[2] / "bench"
FAKE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from gpu.run import Item
from gpu.work import Found
from reporting.reasons import Skip

def ok():
    Path(os.environ["PIDS"]).write_text(str(os.getpid()))
    time.sleep(0.03)
    return Found(1.5, "us")

def fails():
    raise ValueError("no such /srv/place/file.bin\\nand more")

def needs():
    import a_package_that_nobody_has

def skips():
    raise Skip("nothing to do")

def hangs():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {sleeper.pid}")
    time.sleep(60)

def sleeps():
    Path(os.environ["PIDS"]).write_text(str(os.getpid()))
    time.sleep(60)

def dies():
    os.kill(os.getpid(), signal.SIGSEGV)

def loses():
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")
    sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize))
    raise RuntimeError("an illegal memory access was encountered")

def same_process():
    return Found(1.0, "", failure="the device is lost" if "torch" in sys.modules else None)

def lost():
    return Found(float("nan"), "us")

FIRST = {"ok": ok, "fails": fails, "needs": needs, "skips": skips, "lost": lost}
SECOND = {"before": ok, "hangs": hangs, "after": ok}
THIRD = {"lives": ok, "dies": dies, "goes on": ok, "loses": loses, "afresh": same_process}
MANY = {f"line {index}": ok for index in range(20)}

def runner(table):
    def run(work):
        for name, function in table.items():
            work.measure(name, function, attention="none")
    return run

def breaks(work):
    raise RuntimeError("before any line")

def item(number, table, run=None, **options):
    limits = {"seconds": 30, "least_s": 0} | options
    return Item(number, f"title {number}", lambda rehearse: list(table), run or runner(table), **limits)

ITEMS = [
    item(1, FIRST), item(2, SECOND, line_s=1), item(3, THIRD), item(4, {"too late": ok}, least_s=10_000),
    item(5, {"first": ok, "second": ok}, breaks), item(6, MANY), item(7, {"long": hangs, "never": ok}, seconds=2),
    item(8, {"made": ok, "forgotten": ok}, runner({"made": ok})), item(9, {"sleeps": sleeps}),
]
"""


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fakes")
    (folder / "fake_items.py").write_text(FAKE)
    return folder


def command(fakes: Path, *words: object) -> dict[str, Any]:
    """Arguments of subprocess for a call of the run over fake items."""
    code = "import sys; from gpu.run import main; sys.exit(main(sys.argv[1:], 'fake_items'))"
    paths = os.pathsep.join([str(BENCH), str(fakes)])
    environment = os.environ | {"PYTHONPATH": paths, "PIDS": str(fakes / "pids")}
    return {"args": [sys.executable, "-c", code, *map(str, words)], "env": environment}


def call(fakes: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(fakes, *words), capture_output=True, text=True, check=False)


def found_in(out: Path) -> dict[tuple[int, str], dict[str, Any]]:
    return {key: line for key, line in latest((out / "results.jsonl").read_bytes()).items() if key[0]}


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def test_whatever_happens_in_a_line_the_others_are_measured(fakes: Path, tmp_path: Path) -> None:
    done = call(fakes, tmp_path, "--items", "1-5,8")
    assert done.returncode == 0, done.stderr
    status = {name: line["status"] for (_, name), line in found_in(tmp_path).items()}
    assert status == {
        "ok": "ok",
        "fails": "failed: ValueError: no such file.bin",
        "needs": "skipped: no a_package_that_nobody_has",
        "skips": "skipped: nothing to do",
        "lost": "failed: the result is no finite number",
        "before": "ok",
        "hangs": "cut: over the limit of 1 s",
        "after": "ok",
        "lives": "ok",
        "dies": "failed: the process was ended by SIGSEGV",
        "goes on": "ok",
        "loses": "failed: RuntimeError: an illegal memory access was encountered",
        "afresh": "ok",
        "too late": status["too late"],
        "first": "failed: the process ended with status 1: RuntimeError: before any line",
        "second": "failed: the process ended with status 1: RuntimeError: before any line",
        "made": "ok",
        "forgotten": "failed: the item ended without this line",
    }
    assert status["too late"].startswith("skipped: ") and status["too late"].endswith(" s left")
    wait_until_gone([int(pid) for pid in (fakes / "pids").read_text().split()])  # also the child of the one that hung
    before = (tmp_path / "results.jsonl").read_bytes()
    assert str(tmp_path.parent).encode() not in before  # it is published
    call(fakes, tmp_path, "--items", "1-5,8")  # the next call tries what was cut, and nothing else
    again = [json.loads(line) for line in (tmp_path / "results.jsonl").read_bytes()[len(before) :].splitlines()]
    assert [line["name"] for line in again] == ["machine", "hangs", "too late"]


def test_an_item_over_its_limit_is_cut(fakes: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    call(fakes, tmp_path, "--items", "7")
    assert time.monotonic() - start < 20
    found = found_in(tmp_path)
    assert found[7, "long"]["status"].startswith("cut: over the limit of") and found[7, "long"]["again"]
    assert found[7, "never"]["status"] == "cut: the time of the item was over"
    wait_until_gone([int(pid) for pid in (fakes / "pids").read_text().split()])


def test_a_call_that_is_killed_at_any_moment_loses_one_line(fakes: Path, tmp_path: Path) -> None:
    drawn, kills, written = random.Random(), 0, 0
    results, expected = tmp_path / "results.jsonl", {(6, f"line {index}") for index in range(20)}
    for _ in range(6):
        size = results.stat().st_size if results.exists() else 0
        process = subprocess.Popen(**command(fakes, tmp_path, "--items", "6"), stderr=subprocess.DEVNULL)
        while process.poll() is None and (not results.exists() or results.stat().st_size <= size):
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 0.7))
        kills += process.poll() is None
        process.kill()
        process.wait()
        if (fakes / "pids").exists():
            wait_until_gone([int(pid) for pid in (fakes / "pids").read_text().split()])  # nobody goes on measuring
        known = len(found_in(tmp_path))
        assert written <= known  # nothing that was written is ever gone
        written = known
    assert kills
    assert call(fakes, tmp_path, "--items", "6").returncode == 0
    assert set(found_in(tmp_path)) == expected
    counts = Counter(json.loads(line)["name"] for line in results.read_text().splitlines())
    assert all(counts[name] == 1 for _, name in expected)  # a line that is there is not measured again


def test_what_is_being_measured_ends_with_the_call(fakes: Path, tmp_path: Path) -> None:
    pids = fakes / "pids"
    pids.unlink(missing_ok=True)
    process = subprocess.Popen(**command(fakes, tmp_path, "--items", "9"), stderr=subprocess.DEVNULL)
    while not pids.exists() or not pids.read_text():
        time.sleep(0.01)
    process.kill()
    process.wait()
    wait_until_gone([int(pids.read_text())])  # or else it would go on using the device


def test_a_torn_line_is_cut_off_and_the_file_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = Lines(path)
    lines.append(line_of(3, "one", "ok", value=1.0))
    with pytest.raises(BlockingIOError):
        Lines(path)
    lines.append(line_of(3, "two", "cut: over", again=True))
    os.close(lines._file)
    whole = path.read_bytes()
    for torn in (b'{"item": 3, "na', b"{", b'{"item": 3, "name": "three", "status": "ok"}'):
        path.write_bytes(whole + torn)
        lines = Lines(path)
        assert path.read_bytes() == whole
        assert lines.missing(3, ["one", "two", "three"], rehearse=False) == ["two", "three"]
        assert lines.missing(3, ["one"], rehearse=True) == ["one"]  # a figure is no rehearsal, and the other way round
        os.close(lines._file)


def work_of(names: list[str], *, rehearse: bool = False) -> tuple[Work, list[dict[str, Any]]]:
    sent: list[dict[str, Any]] = []
    return Work(Order(3, names, 10.0, rehearse, ".", []), lambda message: sent.append(dict(message))), sent


@pytest.mark.parametrize(
    ("attention", "counts", "status"),
    [
        ("fast", {"torch flash, bfloat16": 4}, "ok"),
        ("fast", {"torch flash, bfloat16": 4, "buckets, float32": 1}, "failed: attention ran in buckets"),
        ("mixed", {"torch flash, bfloat16": 4, "buckets, float32": 1}, "ok"),
        ("mixed", {"torch flash, bfloat16": 4, "buckets, bfloat16": 1}, "failed: attention ran in buckets"),
        ("named", {"buckets, bfloat16": 1}, "ok"),
        ("fast", {}, "ok"),
    ],
)
def test_buckets_are_never_measured_silently(attention: Any, counts: dict[str, int], status: str) -> None:
    for rehearse in (False, True):
        work, sent = work_of(["a", "b"], rehearse=rehearse)
        work.finish("a", Found(2.0, "us"), "ok", work.start("a"), attention=attention, counts=Counter(counts))
        line = sent[-1]["line"]
        assert line["status"] == ("rehearsed" if rehearse else status)
        assert line["value"] == (None if rehearse else 2.0)  # a rehearsal keeps no figure
        assert line["backend"] == (", ".join(f"{name} x {count}" for name, count in sorted(counts.items())) or None)
        assert work.wanted == ["b"]


def test_what_the_attention_records_reaches_the_line() -> None:
    import torch

    from laser_fast.lm.attention import packed_attention as attention

    tensors = [torch.randn(5, 2, 8) for _ in range(3)]
    work, sent = work_of(["a"])

    def attend() -> Found:
        attention.varlen_attention(*tensors, torch.tensor([0, 2, 5], dtype=torch.int32), causal=True)
        return Found(1.0, "us")

    work.measure("a", attend)
    assert sent[-1]["line"]["status"] == "failed: attention ran in buckets"
    assert sent[-1]["line"]["backend"] == "buckets, float32 x 1"


def test_the_device_has_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    device = Work(Order(7, [], 1.0, False, str(tmp_path), []), list.append).context.device
    fractions: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: fractions.append(given), raising=False)
    torch.cuda.set_per_process_memory_fraction(0.5, device)
    assert fractions == [(0.5, 0)]


def test_a_part_of_ours_that_is_missing_is_a_failure() -> None:
    assert status_of(ModuleNotFoundError("x", name="laser_fast.kernels")).startswith("failed: ")
    assert status_of(ModuleNotFoundError("x", name="bitsandbytes.nn")) == "skipped: no bitsandbytes"


def test_the_package_is_importable_where_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_imports_ours", lambda found: False)
    monkeypatch.setattr(machine, "_build", lambda site, found: "there is no ninja")
    monkeypatch.setattr(machine, "_IMPORTS", "import time; time.sleep(60)")  # what is read ahead is not waited for
    monkeypatch.setattr(machine, "_SITES", tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{machine.ROOT}{os.pathsep}{tmp_path / 'other'}")
    for _ in range(2):  # made once
        environment, how = machine.importable([], rehearse=False)
        assert how == "copied, without the compiled library: there is no ninja"
    assert str(machine.ROOT) not in environment["PYTHONPATH"].split(os.pathsep)
    assert str(tmp_path / "other") in environment["PYTHONPATH"].split(os.pathsep)
    code = "import laser_fast, laser_fast.kernels as k; print(laser_fast.__file__); print(k.__file__)"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert [Path(line).is_relative_to(tmp_path) for line in said.stdout.split()] == [True, True]


def test_the_device_is_asked_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771 MiB, 580.1'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.facts("c", "abc")["capability"] == "9.0" and machine.facts("c", "abc")["commit"] == "abc"
    script.write_text("#!/bin/sh\nexit 9\n")
    assert set(nvidia_smi.device().values()) == {None}
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(nvidia_smi, "_ASKING_S", 0.2)
    assert set(nvidia_smi.device().values()) == {None}


def test_the_table_says_what_was_reached_and_what_failed(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "results.jsonl")
    facts = {"device": "NVIDIA H200", "memory": "143771 MiB", "driver": "580.1", "versions": {"torch": "2.11"}}
    facts |= {"command": "python3 bench/gpu_run.py OUT", "date": "2026-01-01", "commit": "abc", "python": "3.12"}
    lines.append(line_of(0, "machine", "ok", package="built for this device", **facts))
    expected = Prediction(430.0, "bytes", bound="memory")
    measured = {"value": 250.0, "unit": "us", "limit": "copy", "share_of_limit": 0.91, "baseline": "eager"}
    measured |= {"speedup": 3.2, "backend": "Triton", "prediction": vars(expected)}
    lines.append(line_of(3, "kernel", "ok", **measured))
    lines.append(line_of(3, "broken", "failed: it is wrong"))
    ratio = vars(Prediction(2.27, "padding", of="speedup"))
    lines.append(line_of(5, "switch", "ok", value=98.0, unit="us/token", prediction=ratio))
    text = tables((tmp_path / "results.jsonl").read_bytes(), {3: "Kernels", 5: "Switches", 6: "Nothing"})
    assert "### 3. Kernels" in text and "### 6." not in text
    assert "| kernel | 250 us | 91.0% of copy | 3.20x eager | 300 us (H100 scaled to H200; bytes) | Triton |" in text
    assert "| broken | failed: it is wrong | - | - | - | - |" in text
    assert "| switch | 98 us/token | - | - | 2.27x (H100; padding) | - |" in text
    assert "`python3 bench/gpu_run.py OUT` on NVIDIA H200, 143771 MiB, driver 580.1, 2026-01-01, commit abc" in text


def test_items_are_numbered_and_names_are_unique() -> None:
    from reporting.waterfall import CUMULATIVE

    assert [item.number for item in ITEMS] == list(range(1, 11))
    # one command of six minutes, in which not every item takes as long as it may
    assert sum(item.seconds for item in ITEMS[:7]) <= 1.16 * 360
    assert _numbers("1-3,9") == [1, 2, 3, 9]
    for item in ITEMS:
        for rehearse in (False, True):
            names = item.names(rehearse)
            assert names and len(set(names)) == len(names)
        assert item.least_s < item.seconds and item.line_s <= item.seconds
    assert waterfall_names(False) == list(CUMULATIVE)
    assert evenly(list(range(10)), 4) == [0, 2, 5, 7] and evenly([1], 4) == [1] and evenly([1, 2], None) == [1, 2]


@pytest.mark.slow
def test_a_rehearsal_that_is_killed_and_called_again_has_every_line(tmp_path: Path) -> None:
    """All ten items on the CPU, in small: no typing error is left to be found on a machine that is lent for minutes."""
    words = [sys.executable, str(BENCH / "gpu_run.py"), str(tmp_path), "--rehearse"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    time.sleep(random.Random().uniform(3, 12))
    process.send_signal(signal.SIGKILL)
    process.wait()
    forking = [sys.executable, str(Path(__file__).with_name("forking_run.py")), *words[2:]]
    environment = machine.environment([], rehearse=True)
    done = subprocess.run(forking, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = found_in(tmp_path)
    assert set(found) == {(item.number, name) for item in ITEMS for name in item.names(True)}
    states = {key: line["status"] for key, line in found.items()}
    assert {key: state for key, state in states.items() if not state.startswith(("rehearsed", "skipped:"))} == {}
    assert all(line["value"] is line["speedup"] is line["share_of_limit"] is None for line in found.values())
    ran = {number for (number, _), line in found.items() if line["status"] == "rehearsed"}
    assert ran >= set(range(1, 11)) - {9}  # all tests of item 9 need a GPU
    shown = subprocess.run([*words[:-1], "--table"], capture_output=True, text=True, check=True).stdout
    assert shown.count("### ") == 10 and "A rehearsal: no figure was kept." in shown
