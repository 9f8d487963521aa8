"""The attack notices what is lost, counts what was tried, and calls nothing passed that did not run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attacking import damages, inputs, kills, operations, threads
from attacking.attack import Line, Scope
from attacking.children import Child, Ended, Findings, carry_out
from attacking.run import ATTACKS
from attacking.table import PAGE, RESULTS, markdown, parts, put_into_page
from attacking.world import World

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scope(tmp_path: Path) -> Scope:
    until = time.monotonic() + 60
    folder = tmp_path / "scratch"
    folder.mkdir()
    nothing: dict[str, Any] = {"rehearse": False, "take": lambda line: None}
    return Scope(world=World(tmp_path / "world"), folder=folder, seed=0, until=until, at_once=2, **nothing)


def test_what_dies_raises_or_hangs_is_lost(tmp_path: Path) -> None:
    def fine(findings: Findings) -> None:
        findings.saw("right", 2)

    def lost(findings: Findings) -> None:
        findings.saw("wrong")
        findings.lose("one", times=3)

    def dies(findings: Findings) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def raises(findings: Findings) -> None:
        raise KeyError("name")

    def hangs(findings: Findings) -> None:
        time.sleep(60)

    found = Findings()
    trials = [fine, lost, dies, raises, hangs]
    for one in carry_out(trials, tmp_path, time.monotonic() + 60, at_once=2, patience=2.0):
        found.add(one)
    assert found.outcomes == {"right": 2, "wrong": 1, "died": 3}
    assert found.lost == 6
    told = " | ".join(found.losses)
    assert "SIGKILL" in told and "KeyError: 'name'" in told and "was not over after 2 s" in told
    assert not list(carry_out(trials, tmp_path, time.monotonic(), at_once=2))  # its time is over


@pytest.mark.parametrize(
    "status, said, message",
    [
        (2, "laser-fast: error: prepare: no\n", "prepare: no"),
        (2, "laser-fast: warning: so\nA:  50%|##  | 1/2 [00:00<00:00,  3.11step/s]\nlaser-fast: error: no\n", "no"),
        (1, "laser-fast: error: no\n", None),
        (2, "laser-fast: error: not YAML\n  in line 3\n", None),
        (2, "Traceback (most recent call last):\nOSError: full\n", None),
        (-9, "", None),
    ],
    ids=["one line", "warning and bar beside it", "other status", "two lines", "traceback", "signal"],
)
def test_only_one_line_with_status_2_is_a_refusal(status: int, said: str, message: str | None) -> None:
    assert Ended(status, "", said, 0.1).refusal() == message


def test_a_command_is_seen_as_it_ends(tmp_path: Path) -> None:
    def work() -> int:
        os.write(2, b"x\n")
        return 3

    end = Child(work, tmp_path).ended()
    assert (end.status, end.err) == (3, "x\n")
    child = Child(lambda: time.sleep(60) or 0, tmp_path)
    child.kill()
    assert child.ended().status == -signal.SIGKILL


def _fragile(place: Path) -> str:
    """A reader with faults: it takes any `a.json`, refuses other lengths of `b.bin`, and does not look at `c.bin`."""
    values = json.loads((place / "a.json").read_text())
    if len((place / "b.bin").read_bytes()) != 64:
        raise ValueError("b.bin must have 64 bytes, got others")
    return f"{values['key']} {(place / 'c.bin').read_bytes().hex()}"


def test_damages_tell_refusals_answers_and_faults_apart(scope: Scope, tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    for place, value in ((whole, 1), (other, 2)):
        place.mkdir()
        (place / "a.json").write_text(json.dumps({"key": value, "other": [value]}))
        (place / "b.bin").write_bytes(bytes([value]) * 64)
        (place / "c.bin").write_bytes(bytes([value]) * 64)
    target = damages.Target("fragile", whole, other, _fragile, 40)
    scope.try_all("fragile", "it", damages._trials(scope, target, [_fragile(whole)]))
    (line,) = scope.lines
    assert line["tried"] == 40 == sum(line["outcomes"].values())
    assert set(line["outcomes"]) == {"exactly as written", "otherwise", "failed", "refused", "refused without a name"}
    right = line["outcomes"]["exactly as written"] + line["outcomes"]["refused"]
    assert line["lost"] == 40 - right
    assert any("KeyError" in loss for loss in line["losses"])


def test_a_damage_is_one_and_follows_from_the_seed(tmp_path: Path) -> None:
    def damaged(seed: int) -> tuple[tuple[str, str], dict[str, bytes]]:
        place = tmp_path / f"{seed}-{time.monotonic_ns()}"
        place.mkdir()
        for name in ("a.json", "b.bin"):
            (place / name).write_bytes(b'{"a": {"b": [1, "x", true]}, "c": null}')
        told = damages.damage(random.Random(seed), place, tmp_path / "none")
        return told, {path.name: path.read_bytes() for path in place.iterdir()}

    for seed in range(30):
        told, files = damaged(seed)
        assert (told, files) == damaged(seed)
        (untouched,) = {"a.json", "b.bin"} - {told[0]}
        assert files[untouched] == b'{"a": {"b": [1, "x", true]}, "c": null}' != files.get(told[0])


def test_a_kill_that_changes_a_file_is_noticed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"loss": 1.0, "time_s": 0.3}\n')
    (run / "finished.json").write_text('{"date": "now"}')
    before = kills.contents(run)
    (run / "metrics.jsonl").write_text('{"loss": 1.0, "time_s": 0.7}\n')
    (run / "finished.json").write_text('{"date": "then"}')
    assert kills.contents(run) == before
    for name, content in (("metrics.jsonl", '{"loss": 1.0000001}\n'), ("left", "")):
        (run / name).write_text(content)
        assert kills.contents(run) != before
        before = kills.contents(run)


def test_mutants_follow_from_the_seed(scope: Scope) -> None:
    kind = inputs.Kind("CSV", {"a.csv": b"x,y\n1,2\n", "b.csv.gz": b"x,y\n1,2\n"}, [], 1, ("b.csv.gz",))

    def mutants(seed: int) -> list[dict[str, bytes]]:
        return [inputs._mutated(random.Random(f"{seed}/{number}"), kind) for number in range(50)]

    assert [mutant["a.csv"] for mutant in mutants(0)] == [mutant["a.csv"] for mutant in mutants(0)]
    assert len({mutant["a.csv"] for mutant in mutants(0)}) > 15


def test_a_mutant_is_judged_by_how_its_command_ends(scope: Scope, tmp_path: Path) -> None:
    kind = inputs.Kind("CSV", {}, [], 1)
    refused = Ended(2, "", "laser-fast: error: prepare: no\n", 0.1)
    assert inputs._judged(refused, tmp_path, kind)[0] == "refused" and not inputs._judged(refused, tmp_path, kind)[1]
    for end in (Ended(-11, "", "", 0.1), Ended(70, "", "KeyError: 1\n", 0.1), Ended(0, "", "", 0.1)):
        assert inputs._judged(end, tmp_path, kind)[1]  # of the last there is no result
    (tmp_path / ".out.0123456789ab.partial").mkdir()
    assert "left" in inputs._judged(refused, tmp_path, kind)[1]


class _Racy:
    """Keeps the history of a call where the next one finds it."""

    training = False
    train = keep_prefixes = lambda self, _: None

    def recommend(self, histories: list[list[str]], k: int) -> list[list[Any]]:
        self.history = histories[0]
        time.sleep(1e-4)
        return [[SimpleNamespace(item_id=item, score=0.0) for item in self.history]]


def test_answers_of_other_users_are_noticed(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = SimpleNamespace(histories=lambda: [[f"i{user}"] for user in range(40)])
    monkeypatch.setattr(threads, "model", lambda *_, **__: _Racy())
    how = ("bert", dict[str, Any](), 0, False)
    scope.try_all("racy", "it", [lambda findings: threads._try(findings, world, how, "recommend", 200)])
    (line,) = scope.lines
    assert line["tried"] == 200 and 0 < line["lost"] == line["outcomes"]["otherwise"]
    assert "another answer" in line["losses"][0]


@pytest.mark.parametrize(
    "script, lost, not_run",
    [
        ('print(1); print(\'{"calls": 5, "answered": 3, "refused": 2, "wrong": 0}\')', 0, None),
        ('print(\'{"calls": 5, "answered": 2, "refused": 1, "wrong": 2}\'); raise SystemExit(1)', 2, None),
        ("import os; os.abort()", 1, None),
        (None, 0, "there is no fuzz_operations.py"),
    ],
    ids=["right", "wrong", "dies", "not there"],
)
def test_operations_are_counted_as_their_script_says(
    scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, lost: int, not_run: str | None
) -> None:
    file = tmp_path / "fuzz_operations.py"
    if script is not None:
        file.write_text(script)
    monkeypatch.setattr(operations, "_SCRIPT", file)
    operations.attack(scope)
    (line,) = scope.lines
    assert (line["lost"], line["not_run"]) == (lost, not_run)
    assert line["tried"] == {0: 5, 2: 5, 1: 1}[lost] if script else line["tried"] == 0


@pytest.mark.slow
def test_a_rehearsal_tries_everything_once(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "bench" / "attack.py"), str(tmp_path / "out"), "--rehearse"]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    report = json.loads((tmp_path / "out" / "attack.json").read_text())
    lines = report["lines"]
    assert report["rehearsal"] and str(tmp_path) not in json.dumps(report)
    assert done.returncode == 0, [loss for line in lines for loss in line["losses"]] or done.stderr
    assert {"prepare", "train", "a run", "CSV", "operations", "places"} <= {line["name"] for line in lines}
    assert len(lines) >= 20 > len(ATTACKS)
    for line in lines:
        assert bool(line["tried"]) != bool(line["not_run"]), line
        assert line["tried"] == sum(line["outcomes"].values())
    assert "died" not in {outcome for line in lines for outcome in line["outcomes"]}, done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["attack.json"]


def test_the_page_has_the_table_of_its_file(tmp_path: Path) -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert parts(PAGE.read_text(encoding="utf-8"))[1].strip() == markdown(report)
    assert not report["rehearsal"]
    rehearsed = tmp_path / "attack.json"
    rehearsed.write_text(json.dumps(report | {"rehearsal": True}))
    with pytest.raises(ValueError, match="attack.json must be of a real run, got a rehearsal"):
        put_into_page(rehearsed)
    with pytest.raises(ValueError, match="the page must have the marks"):
        parts("no marks")


def test_what_did_not_run_is_no_pass() -> None:
    counts: Line = {"tried": 3, "outcomes": {"refused": 2, "failed": 1}, "lost": 1, "not_run": None}
    lines = [{"what": "one", **counts}, {"what": "two", **counts, "tried": 0, "outcomes": {}, "not_run": "no time"}]
    environment = dict.fromkeys(("cores", "processor", "date", "commit", "python"), "x") | {"versions": {}}
    report = {"lines": lines, "command": "attack", "seconds": 60.0, "environment": environment}
    rows = markdown(report).splitlines()
    assert rows[2] == "| one | 3 | 2 refused, 1 failed | 1 |"
    assert rows[3] == "| two | not run | no time |  |"
