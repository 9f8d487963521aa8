"""The sweep over tiles: rehearsed without a GPU, its order of candidates, and that its lines fit the table."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

import tune_kernels
from tune_kernels import line, main, ordered, swept_keys, workloads_of

from laser_fast.kernels import routing, tiles
from laser_fast.kernels.tiles import TILES, Key, Tile


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("rehearses in Triton's interpreter, and here kernels are compiled for the GPU")


def test_a_rehearsal_runs_every_candidate_and_keeps_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(TILES)
    looked_up: list[tuple[Key, Tile]] = []
    of_table = tiles.tile

    def tile(*parts: object, **named: object) -> Tile:
        found = of_table(*parts, **named)  # type: ignore[arg-type]
        looked_up.append((Key(*parts, **named), found))  # type: ignore[arg-type]
        return found

    for module in (routing, tune_kernels.dispatch, sys.modules["laser_fast.kernels.routing_backward"]):
        monkeypatch.setattr(module, "tile", tile)
    assert main([str(tmp_path / "out.json"), "--rehearse"]) == 0
    assert before == TILES
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["device"] == "Triton's interpreter" and report["left_out"] == []
    assert [Key(**row["key"]) for row in report["tiles"]] == swept_keys()
    assert all(set(row) == {"key", "tiles", "was_first"} for row in report["tiles"])
    assert {(key, candidate) for key in swept_keys() for candidate in TILES[key]} <= set(looked_up)
    # and what it prints could take the place of the lines of the table
    table = Path(tiles.__file__).read_text()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(swept_keys()) and all(f"\n{text}\n" in table for text in printed)


def test_keys_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out.json"), "--rehearse", "--seconds", "0"]) == 1
    assert len(json.loads((tmp_path / "out.json").read_text())["left_out"]) == len(swept_keys())
    assert "left out after 0 s: Key(" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out.json")])
    assert "needs a CUDA device, and torch sees none; --rehearse runs without" in capsys.readouterr().err


def test_the_order_is_that_of_times_relative_to_the_best_and_the_first_stays_within_the_noise() -> None:
    first, second, third = Tile(1, 1, 1), Tile(2, 2, 2), Tile(3, 3, 3)
    given = first, second, third
    # the second is best in the mean, though the large workload alone would choose the third
    times = {"small": {first: 2, second: 1, third: 2}, "large": {first: 90, second: 50, third: 45}}
    assert ordered(given, times) == (second, third, first)
    assert ordered(given, {"small": {first: 1.01, second: 1.0, third: 3}}) == (first, second, third)
    assert ordered(given, {"small": {first: 1.05, second: 1.0, third: 3}}) == (second, first, third)


def test_workloads_are_those_of_the_benchmarks() -> None:
    few = workloads_of(Key("route_items", 16, "float", "few"), rehearse=False)
    (small,) = few.values()
    assert list(few) == ["gpu-small"] and (small.users, small.items, small.dtype) == (256, 20, torch.float32)
    assert set(workloads_of(Key("route_items", 16, "half", "many"), rehearse=False)) == {"gpu-large"}
    both = workloads_of(Key("combine", 0, "half"), rehearse=False)
    assert {name: (shape.users, shape.dtype) for name, shape in both.items()} == {
        "gpu-small": (256, torch.bfloat16),
        "gpu-large": (2048, torch.bfloat16),
    }


def test_lines_drop_what_a_tile_does_not_depend_on() -> None:
    assert line(Key("sum_partials"), (Tile(1, 2, 3, 4),)) == '    Key("sum_partials"): (Tile(1, 2, 3, 4)),'
    assert line(Key("a", 0, "half"), (Tile(1, 2, 3),) * 2) == (
        '    Key("a", 0, "half"): (Tile(1, 2, 3, 3), Tile(1, 2, 3, 3)),'
    )
