"""The commands that measure, on runs with a split by time, cold items and users without a history."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from laser_fast.cli import main
from laser_fast.evaluation import Candidates

_SPLIT = {"kind": "global-time", "valid_from": 4, "test_from": 5}
_WORDS = "abcde"


def _write_log(folder: Path) -> None:
    """30 users walk through 20 items; from moment 4 on, every second one meets one of five new items; two come late."""
    events = ["user_id,item_id,timestamp"]
    for user in range(30):
        for step in range(4 + user % 4):
            item = 20 + user % 5 if step >= 4 and user % 2 else (user * 3 + step) % 20
            events.append(f"u{user},i{item},{step}")
    events += ["late1,i3,4", "late1,i4,5", "late2,i5,5"]
    (folder / "events.csv").write_text("\n".join(events) + "\n", encoding="utf-8")
    items = [f"i{index},{_WORDS[index // 5]} {_WORDS[index % 5]}" for index in range(25)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a recommender of the split by time, and two runs with other seeds."""
    folder = tmp_path_factory.mktemp("measured")
    _write_log(folder)
    source = ["--interactions", str(folder / "events.csv"), "--items", str(folder / "items.csv")]
    assert main(["prepare", str(folder / "set"), *source]) == 0
    settings = ["width=8", "num_layers=1", "max_length=10", "epochs=1"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    arguments += ["--split", "global-time", "--split-set", "valid_from=4", "--split-set", "test_from=5"]
    assert main(["recommender", "train", str(folder / "set"), str(folder / "sasrec"), *arguments]) == 0
    config: dict[str, Any] = {
        "data": str(folder / "set"),
        "recommender": str(folder / "sasrec"),
        "output": "",
        "split": _SPLIT,
        "lm": {"path": str(tiny_lm)},
        "mformer": {"width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 2, "num_queries": 2, "max_history": 4},
        "training": {"batch_size": 16, "phase_a": {"epochs": 1, "rows_per_epoch": 32}, "phase_b": {"epochs": 0}},
    }
    (folder / "laser.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for seed in (0, 1):
        changed = ["--set", f"training.seed={seed}", "--set", f"output={folder / f'run{seed}'}"]
        assert main(["train", str(folder / "laser.yaml"), *changed]) == 0
    return folder


def test_cold_items_are_recommended_and_reported_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    assert main(["evaluate", str(folder / "run0"), "--output", str(output), "--bootstrap", "200"]) == 0
    printed = capsys.readouterr().out
    assert "global time, validation from 4, test from 5" in printed and "full ranking" in printed
    assert "targets never seen in training: NDCG@10" in printed
    assert "Laser, HR@10: 95% bootstrap interval [" in printed
    figures = json.loads(output.read_text())["figures"]["Laser"]
    seen, cold = figures["groups"]["seen in training"]
    assert (figures["rows"], seen["rows"], cold["rows"]) == (16, 9, 7)
    assert main(["recommend", str(folder / "run0"), "--history", "i1", "-k", "25", "--include-seen", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["recommendations"]
    scores = {item["item"]: item["score"] for item in answer}
    assert len(scores) == 25  # the five that no training sequence holds are among them
    assert np.isfinite(list(scores.values())).all() and len({scores[f"i{index}"] for index in range(20, 25)}) == 5


def test_several_runs_give_their_spread(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder / "run0"), str(folder / "run1")]
    assert main(["evaluate", *runs, "--output", str(tmp_path / "figures.json")]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    means = [figures["runs"][run]["Laser"]["metrics"]["MRR"]["mean"] for run in runs]
    spread = figures["spread"]["Laser"]["MRR"]
    assert spread == {
        "mean": pytest.approx(np.mean(means)),
        "deviation": pytest.approx(np.std(means, ddof=1)),
        "runs": 2,
    }
    assert f"{spread['mean']:.4f} (sd {spread['deviation']:.4f})" in printed and "mean of 2 runs" in printed


def test_sampled_rankings_have_names_and_stored_draws(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "candidates.safetensors"
    command = ["evaluate", str(folder / "run0"), "--protocol", "uniform", "--candidates", "10", "--draws", "3"]
    command += ["--candidates-file", str(stored), "--output", str(tmp_path / "figures.json")]
    outputs = []
    for _ in range(2):  # drawn and written, then read
        assert main([*command, "--seed", str(len(outputs))]) == 0
        outputs.append(capsys.readouterr().out)
    assert Candidates.load(stored).items.shape == (3, 16, 10)
    assert outputs[0] == outputs[1] and "sampled ranking, no full one: the target among 10" in outputs[0]
    metrics = json.loads((tmp_path / "figures.json").read_text())["figures"]["Laser"]["metrics"]
    assert all(name.endswith("|sampled10") for name in metrics)
    assert main([*command, "--protocol", "popularity"]) == 2
    assert "must hold candidates of --protocol popularity, got uniform ones" in capsys.readouterr().err
    popular = ["--protocol", "popularity", "--candidates", "5", "--draws", "2"]
    assert main(["evaluate", str(folder / "run0"), *popular]) == 0
    assert "HR@1|popularity5" in capsys.readouterr().out
    assert main(["evaluate", str(folder / "run0"), "--protocol", "llara"]) == 0
    assert "HR@1|sampled20" in (printed := capsys.readouterr().out) and "20 draws of seed 0" in printed
    assert main(["evaluate", str(folder / "run0"), *popular, "--bootstrap", "9"]) == 2
    assert "--bootstrap is for the full ranking, got --protocol popularity" in capsys.readouterr().err


def test_significance_between_two_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder / "run0"), str(folder / "run1")]
    assert main(["significance", *runs, "--resamples", "500", "--output", str(tmp_path / "d.json")]) == 0
    written = json.loads((tmp_path / "d.json").read_text())["figures"]
    assert [entry["metric"] for entry in written["differences"]] == ["HR@10", "NDCG@10", "MRR"]
    assert written["differences"][0]["rows"] == 16
    assert f"p = {written['differences'][2]['p_value']:.4f}" in capsys.readouterr().out
    assert main(["significance", runs[0], runs[0], "--metrics", "MRR"]) == 0
    assert "MRR +0.0000 [+0.0000, +0.0000], p = 1.0000" in capsys.readouterr().out


def test_the_split_is_part_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = ["--set", "split.test_from=6", "--set", f"output={folder / 'never'}"]
    assert main(["train", str(folder / "laser.yaml"), *moved]) == 2  # the recommender was trained on another split
    assert "load_recommender: split_hash must be" in capsys.readouterr().err
    assert main(["recommender", "train", str(folder / "set"), str(folder / "never"), "--split", "random"]) == 2
    assert "kind: Input should be 'leave-one-out'" in capsys.readouterr().err


def test_runs_of_different_splits_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["--set", "recommender=null", "--set", "bituning.prefix=none", "--set", "split.targets=last"]
    other += ["--set", f"output={tmp_path / 'other'}", "--set", "evaluation.calibrate=false"]
    assert main(["train", str(folder / "laser.yaml"), *other]) == 0
    for command in ("significance", "evaluate"):
        assert main([command, str(folder / "run0"), str(tmp_path / "other")]) == 2
        assert f"{command}: runs must have one split, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "run0", "nowhere"], "no such folder: '.*nowhere'"),
        (["evaluate", "run0", "sasrec"], r"must hold a model, got none in '.*sasrec'; if it was stopped, .*--resume"),
        (["evaluate", "run0", "--protocol", "uniform", "--bootstrap", "9"], "--bootstrap is for the full ranking"),
        (["significance", "run0", "nowhere"], "no such folder: '.*nowhere'"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_run_is_ranked(
    folder: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err) and printed.out == ""
