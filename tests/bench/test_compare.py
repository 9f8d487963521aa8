"""Comparing two runs of the benchmarks: what counts as a fall, what cannot be compared, and what is said."""

import json
import re
from pathlib import Path
from typing import Any

import compare
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEP = "bench/bench_step.py::test_padded[small]"
ROUTING = "bench/bench_routing.py::test_route_experts[small]"


def recorded(ratios: dict[str, dict[str, Any]], gpu: str | None = "A card") -> dict[str, Any]:
    entries = [{"fullname": name, "extra_info": {"median_ms": {"a": 1.0}, **info}} for name, info in ratios.items()]
    return {"machine_info": {"cpu": {"brand_raw": "A processor"}, "gpu": gpu}, "benchmarks": entries}


STORED = {STEP: {"speedup_over_padded": 2.0}, ROUTING: {"speedup_over_loop": 4.0, "roofline_fraction": 0.8}}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Write both runs and compare them."""

    def write_and_compare(new: object, stored: object, *options: str) -> int:
        for name, content in (("new", new), ("stored", stored)):
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        return compare.main([str(tmp_path / "new.json"), str(tmp_path / "stored.json"), *options])

    return write_and_compare


def changed(benchmark: str, **ratios: float) -> dict[str, dict[str, Any]]:
    return {**STORED, benchmark: {**STORED[benchmark], **ratios}}


def test_a_run_stands_against_itself(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recorded(STORED), recorded(STORED)) == 0
    said = capsys.readouterr()
    assert f"{STEP} speedup_over_padded" in said.out and said.err == ""
    assert len(said.out.splitlines()) == 1 + 3


@pytest.mark.parametrize(
    ("new", "options", "status"),
    [
        (1.71, [], 0),
        (1.69, [], 1),
        (1.69, ["--margin", "0.2"], 0),
        (1.99, ["--margin", "0"], 1),
        (9.0, [], 0),
    ],
)
def test_the_margin_decides(new: float, options: list[str], status: int, run: Any) -> None:
    assert run(recorded(changed(STEP, speedup_over_padded=new)), recorded(STORED), *options) == status


def test_every_fall_is_named(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    new = {STEP: {"speedup_over_padded": 1.0}, ROUTING: {"speedup_over_loop": 4.0, "roofline_fraction": 0.5}}
    assert run(recorded(new), recorded(STORED)) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{ROUTING}: roofline_fraction fell to 0.500, stored is 0.800, margin 15%",
        f"{STEP}: speedup_over_padded fell to 1.000, stored is 2.000, margin 15%",
    ]


def test_what_is_gone_is_named_once_and_what_is_new_is_welcome(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    new = {ROUTING: {"roofline_fraction": 0.8}, "bench/bench_new.py::test_new": {"speedup_over_old": 0.1}}
    assert run(recorded(new), recorded(STORED)) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{STEP}: not in the new run",
        f"{ROUTING}: speedup_over_loop is gone, stored is 4.000, margin 15%",
    ]
    assert run(recorded(STORED | new | {ROUTING: STORED[ROUTING]}), recorded(STORED)) == 0


def test_two_devices(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slower = changed(ROUTING, roofline_fraction=0.1)
    assert run(recorded(slower, gpu="Another card"), recorded(STORED)) == 2
    assert capsys.readouterr().err == (
        "compare: both runs must be of one device, got 'Another card' and 'A card'; "
        "--other-device compares the speed-ups all the same\n"
    )
    assert run(recorded(slower, gpu="Another card"), recorded(STORED), "--other-device") == 0
    assert "roofline_fraction" not in capsys.readouterr().out
    assert run(recorded(slower), recorded(STORED), "--other-device") == 1  # one device after all
    assert run(recorded(STORED, gpu=None), recorded(STORED)) == 2
    assert "got 'A processor' and 'A card'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "new.json must be a JSON file, got Expecting property name"),
        ([], "new.json must be written by --benchmark-json, got no list indices"),
        ({"benchmarks": []}, "new.json must be written by --benchmark-json, got no 'machine_info'"),
        ({**recorded({}), "benchmarks": [{"name": "x"}]}, "must be written by --benchmark-json, got no 'fullname'"),
        (recorded({STEP: {"useful_tokens": 3}}), "new.json must hold ratios, got none in 1 benchmarks"),
        (recorded({STEP: {"speedup_over_x": "2"}}), "speedup_over_x of bench.* must be a number, got '2'"),
    ],
)
def test_unusable_files(content: object, complaint: str, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(content, recorded(STORED)) == 2
    said = capsys.readouterr()
    assert said.out == "" and re.search(f"^compare: .*{complaint}", said.err)


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path / "no.json"), str(tmp_path / "no.json")]) == 2
    assert "no.json must be a JSON file, got [Errno 2]" in capsys.readouterr().err


@pytest.mark.parametrize("margin", ["-0.1", "1"])
def test_a_margin_is_a_share(margin: str, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(recorded(STORED), recorded(STORED), "--margin", margin)
    assert f"margin must be from 0 to 1, got {margin}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", sorted((ROOT / "bench" / "results" / "cpu").glob("bench-*.json")), ids=lambda f: f.name
)
def test_stored_runs_can_be_compared(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(file), str(file)]) == 0
    assert "speedup_over_" in capsys.readouterr().out
