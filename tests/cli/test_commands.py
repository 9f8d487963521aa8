"""The commands as a user types them, from files to recommendations: a split by time, cold items, empty histories."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from laser_fast import LaserModel
from laser_fast.cli import main
from laser_fast.evaluation import Candidates

_WORDS = "abcde"
Command = Callable[..., str]


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
    folder = tmp_path_factory.mktemp("cli")
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
        "output": str(folder / "run0"),
        "split": {"kind": "global-time", "valid_from": 4, "test_from": 5},
        "lm": {"path": str(tiny_lm)},
        "mformer": {"width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 2, "num_queries": 2, "max_history": 4},
        "training": {"batch_size": 16, "phase_a": {"epochs": 5, "rows_per_epoch": 32}, "phase_b": {"epochs": 0}},
    }
    (folder / "laser.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for seed in (0, 1):
        changes = [f"training.seed={seed}", f"output={folder / f'run{seed}'}", "training.phase_a.epochs=1"]
        assert main(["train", str(folder / "laser.yaml"), *(f"--set={change}" for change in changes)]) == 0
    return folder


def test_the_effective_configuration_is_saved(folder: Path) -> None:
    saved = yaml.safe_load((folder / "run0" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["training"]["phase_a"]["epochs"] == 1  # the override, not the file's 5
    assert saved["objective"]["temperature"] == 0.05  # a default


def test_evaluate_prints_what_it_writes_and_cold_items_apart(folder: Path, tmp_path: Path, command: Command) -> None:
    output = tmp_path / "figures.json"
    printed = command("evaluate", folder / "run0", "--output", output, "--bootstrap", 200)
    written = json.loads(output.read_text())
    figures = written["figures"]["Laser"]
    value = figures["metrics"]["NDCG@10"]
    assert f"{value['mean']:.4f} +- {value['ci95']:.4f}" in printed
    assert written["environment"]["versions"]["torch"]
    assert "global time, validation from 4, test from 5" in printed and "full ranking" in printed
    assert "targets never seen in training: NDCG@10" in printed
    assert "Laser, HR@10: 95% bootstrap interval [" in printed
    seen, cold = figures["groups"]["seen in training"]
    assert (figures["rows"], seen["rows"], cold["rows"]) == (16, 9, 7)


def test_compare_lists_every_system(folder: Path, tmp_path: Path, command: Command) -> None:
    printed = command("compare", folder / "run0", "--output", tmp_path / "table.json")
    systems = ["Popularity", "Markov-1", "ItemKNN", "SequentialRules", "SASRec", "SASRec, calibrated", "zero-shot LM"]
    systems += ["zero-shot LM, calibrated", "no-training fusion", "cached text line", "Laser, cosine only", "Laser"]
    assert list(json.loads((tmp_path / "table.json").read_text())["figures"]["systems"]) == systems
    lines = [line.split("  ")[0] for line in printed.splitlines()]
    assert [line for line in lines if line in systems] == systems


def test_several_runs_give_their_spread(folder: Path, tmp_path: Path, command: Command) -> None:
    runs = [str(folder / "run0"), str(folder / "run1")]
    printed = command("evaluate", *runs, "--output", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    means = [figures["runs"][run]["Laser"]["metrics"]["MRR"]["mean"] for run in runs]
    spread = figures["spread"]["Laser"]["MRR"]
    assert (spread["mean"], spread["deviation"]) == pytest.approx((np.mean(means), np.std(means, ddof=1)))
    assert spread["runs"] == 2
    assert f"{spread['mean']:.4f} (sd {spread['deviation']:.4f})" in printed and "mean of 2 runs" in printed


def test_sampled_rankings_have_names_and_stored_draws(folder: Path, tmp_path: Path, command: Command) -> None:
    stored, sampled = tmp_path / "candidates.safetensors", ("evaluate", folder / "run0", "--protocol")
    uniform = (*sampled, "uniform", "--candidates", 10, "--draws", 3, "--candidates-file", stored)
    uniform = (*uniform, "--output", tmp_path / "figures.json")
    drawn, read = (command(*uniform, "--seed", seed) for seed in (0, 1))
    assert Candidates.load(stored).items.shape == (3, 16, 10)
    assert drawn == read and "sampled ranking, no full one: the target among 10" in drawn
    metrics = json.loads((tmp_path / "figures.json").read_text())["figures"]["Laser"]["metrics"]
    assert all(name.endswith("|sampled10") for name in metrics)
    refused = command(*uniform, "--protocol", "popularity", status=2)
    assert "must hold candidates of --protocol popularity, got uniform ones" in refused
    assert "HR@1|popularity5" in command(*sampled, "popularity", "--candidates", 5, "--draws", 2)
    assert "HR@1|sampled20" in (printed := command(*sampled, "llara")) and "20 draws of seed 0" in printed


def test_significance_between_two_runs(folder: Path, tmp_path: Path, command: Command) -> None:
    first, second = folder / "run0", folder / "run1"
    printed = command("significance", first, second, "--resamples", 500, "--output", tmp_path / "d.json")
    written = json.loads((tmp_path / "d.json").read_text())["figures"]["differences"]
    assert [entry["metric"] for entry in written] == ["HR@10", "NDCG@10", "MRR"]
    assert written[0]["rows"] == 16 and f"p = {written[2]['p_value']:.4f}" in printed
    same = command("significance", first, first, "--metrics", "MRR")
    assert "MRR +0.0000 [+0.0000, +0.0000], p = 1.0000" in same


def test_runs_of_different_splits_are_refused(folder: Path, tmp_path: Path, command: Command) -> None:
    changes = ["recommender=null", "bituning.prefix=none", "split.targets=last", "evaluation.calibrate=false"]
    changes += ["training.phase_a.epochs=1", f"output={tmp_path / 'other'}"]
    command("train", folder / "laser.yaml", *(f"--set={change}" for change in changes))
    for name in ("significance", "evaluate"):
        refused = command(name, folder / "run0", tmp_path / "other", status=2)
        assert f"{name}: runs must have one split, got" in refused


def test_a_data_set_with_another_split_is_refused(folder: Path, tmp_path: Path, command: Command) -> None:
    events = ["user_id,item_id,timestamp", *(f"u{user},i{step},{step}" for user in range(4) for step in range(6))]
    (tmp_path / "events.csv").write_text("\n".join(events) + "\n", encoding="utf-8")
    command("prepare", tmp_path / "other", "--interactions", tmp_path / "events.csv")
    assert "split_hash must be" in command("evaluate", folder / "run0", "--data", tmp_path / "other", status=2)


def test_recommend_for_a_history_of_ids(folder: Path, command: Command) -> None:
    question = ("recommend", folder / "run0", "--json", "--history")
    answer = json.loads(command(*question, "i1", "i2", "-k", 3))
    assert answer["history"] == ["i1", "i2"] and len(answer["recommendations"]) == 3
    assert not {"i1", "i2"} & {item["item"] for item in answer["recommendations"]}
    everything = json.loads(command(*question, "i1", "-k", 25, "--include-seen"))
    scores = {item["item"]: item["score"] for item in everything["recommendations"]}
    assert len(scores) == 25  # the five that no training sequence holds are among them
    assert np.isfinite(list(scores.values())).all() and len({scores[f"i{index}"] for index in range(20, 25)}) == 5


def test_a_saved_model_needs_no_data_set(folder: Path, tmp_path: Path, command: Command, tiny_lm: Path) -> None:
    LaserModel.from_pretrained(folder / "run0").save_pretrained(tmp_path / "alone")
    question = ("--history", "i1", "i2", "-k", 3, "--json")
    answers = [json.loads(command("recommend", place, *question)) for place in (folder / "run0", tmp_path / "alone")]
    assert answers[0] == answers[1]
    refused = command("recommend", tmp_path / "alone", status=2)
    assert "must come from a training run, got a model saved on its own" in refused
    assert "the folder must hold a run or a saved Laser" in command("recommend", tiny_lm, *question, status=2)


def test_recommend_in_words(folder: Path, command: Command) -> None:
    printed = command("recommend", folder / "run0", "--user", "u3")
    assert "user u3, 7 items, the newest last:" in printed
    assert "    5. " in printed and "    6. " not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "run0", "--user", "nobody"], "--user must name users of the data set, got 'nobody'"),
        (["recommend", "run0", "-k", "0"], "-k: must be a whole number from 1 to 1000000, got '0'"),
        (["train", "laser.yaml"], "output must be a new or empty folder"),
        (["train", "laser.yaml", "--set=mformer.topk=1"], "'mformer.topk', did you mean 'mformer.top_k'"),
        (["train", "laser.yaml", "--set=split.test_from=6", "--set=output=never"], "recommender: split_hash must be"),
        (["recommender", "train", "set", "never", "--split", "random"], "kind: Input should be 'leave-one-out'"),
        (["evaluate", "run0", "nowhere"], "no such folder: '.*nowhere'"),
        (["evaluate", "run0", "sasrec"], r"must hold a model, got none in '.*sasrec'; if it was stopped, .*--resume"),
        (["evaluate", "run0", "--protocol", "uniform", "--bootstrap", "9"], "for the full ranking, got .* uniform"),
        (["significance", "run0", "nowhere"], "no such folder: '.*nowhere'"),
    ],
)
def test_refused_input_is_one_line_on_stderr(
    folder: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is wrong with any run is told before the first one is ranked."""
    monkeypatch.chdir(folder)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    error = printed.err.splitlines()[-1]
    assert error.startswith("laser-fast: error: ") and re.search(message, error)
    assert arguments[0] == "train" or printed.out == ""


def test_plan_says_what_a_card_takes(tiny_settings: dict[str, Any], tmp_path: Path, command: Command) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_settings))
    printed = json.loads(command("plan", path, "--gpu", "8GB", "--items", 5000, "--json"))
    assert printed["workload"]["num_items"] == 5000
    assert printed["proposals"]["8GB"]["micro_batch_tokens"] > 1000
    assert "CUDA context" not in command("plan", path, "--cpu")
