"""The commands as a user types them, from files to recommendations, in one process each."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from laser_fast.cli import main


@pytest.fixture(scope="module")
def trained(tiny_lm: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which `recommender train` and `train` were run."""
    folder = tmp_path_factory.mktemp("cli")
    settings = ["width=8", "num_layers=1", "max_length=10", "epochs=2"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert main(["recommender", "train", str(tiny_data), str(folder / "sasrec"), *arguments]) == 0
    config = {
        "data": str(tiny_data),
        "recommender": str(folder / "sasrec"),
        "output": str(folder / "laser"),
        "lm": {"path": str(tiny_lm)},
        "mformer": {"width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 2, "num_queries": 2, "max_history": 4},
        "training": {"batch_size": 16, "phase_a": {"epochs": 5}, "phase_b": {"epochs": 0}},
    }
    (folder / "laser.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["train", str(folder / "laser.yaml"), "--set", "training.phase_a.epochs=1"]) == 0
    return folder


def test_the_effective_configuration_is_saved(trained: Path) -> None:
    saved = yaml.safe_load((trained / "laser" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["training"]["phase_a"]["epochs"] == 1  # the override, not the file's 5
    assert saved["objective"]["temperature"] == 0.05  # a default


def test_evaluate_prints_and_writes_the_same_figures(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained / "laser"), "--output", str(tmp_path / "figures.json")]) == 0
    written = json.loads((tmp_path / "figures.json").read_text())
    printed = capsys.readouterr().out
    value = written["figures"]["Laser"]["metrics"]["NDCG@10"]
    assert f"{value['mean']:.4f} +- {value['ci95']:.4f}" in printed
    assert "leave-one-out" in printed and "full ranking" in printed
    assert written["environment"]["versions"]["torch"]


def test_compare_lists_every_system(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(trained / "laser"), "--output", str(tmp_path / "table.json")]) == 0
    systems = [
        "Popularity",
        "Markov-1",
        "ItemKNN",
        "SequentialRules",
        "SASRec",
        "SASRec, calibrated",
        "zero-shot LM",
        "zero-shot LM, calibrated",
        "no-training fusion",
        "cached text line",
        "Laser, cosine only",
        "Laser",
    ]
    assert list(json.loads((tmp_path / "table.json").read_text())["figures"]["systems"]) == systems
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line in systems] == systems


def test_recommend_for_a_history_of_ids(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(trained / "laser"), "--history", "i1", "i2", "-k", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["history"] == ["i1", "i2"]
    assert len(answer["recommendations"]) == 3
    assert not {"i1", "i2"} & {item["item"] for item in answer["recommendations"]}


def test_a_saved_model_needs_no_data_set(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_lm: Path
) -> None:
    from laser_fast import LaserModel

    LaserModel.from_pretrained(trained / "laser").save_pretrained(tmp_path / "alone")
    question = ["--history", "i1", "i2", "-k", "3", "--json"]
    answers = []
    for folder in (trained / "laser", tmp_path / "alone"):
        assert main(["recommend", str(folder), *question]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert main(["recommend", str(tmp_path / "alone")]) == 2
    assert "must come from a training run, got a model saved on its own" in capsys.readouterr().err
    assert main(["recommend", str(tiny_lm), *question]) == 2
    assert "the folder must hold a run or a saved Laser" in capsys.readouterr().err


def test_recommend_in_words(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(trained / "laser"), "--user", "u3"]) == 0
    printed = capsys.readouterr().out
    assert "user u3, 7 items, the newest last:" in printed
    assert "    5. " in printed and "    6. " not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "RUN", "--user", "nobody"], "--user must name users of the data set, got 'nobody'"),
        (["recommend", "RUN", "-k", "0"], "-k: must be a whole number from 1 to 1000000, got '0'"),
        (["train", "RUN/../laser.yaml"], "output must be a new or empty folder"),
        (
            ["train", "RUN/../laser.yaml", "--set", "mformer.topk=1"],
            "unknown key 'mformer.topk', did you mean 'mformer.top_k'?",
        ),
        (["evaluate", "RUN/nowhere"], "no such folder"),
    ],
)
def test_refused_input_is_one_line_on_stderr(
    trained: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("RUN", str(trained / "laser")) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("laser-fast: error: ") and message in error


def test_a_recommender_of_another_split_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = ["user_id,item_id,timestamp", *(f"u{user},i{step},{step}" for user in range(4) for step in range(5))]
    (tmp_path / "events.csv").write_text("\n".join(events) + "\n", encoding="utf-8")
    assert main(["prepare", str(tmp_path / "other"), "--interactions", str(tmp_path / "events.csv")]) == 0
    assert main(["evaluate", str(trained / "laser"), "--data", str(tmp_path / "other")]) == 2
    assert "split" in capsys.readouterr().err.splitlines()[-1]


def test_doctor_answers_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report: Any = json.loads(capsys.readouterr().out)
    assert "torch" in json.dumps(report)


def test_plan_says_what_a_card_takes(tiny_settings: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_settings))
    assert main(["plan", str(path), "--gpu", "8GB", "--items", "5000", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["workload"]["num_items"] == 5000
    assert printed["proposals"]["8GB"]["micro_batch_tokens"] > 1000
    assert main(["plan", str(path), "--cpu"]) == 0
    assert "CUDA context" not in capsys.readouterr().out
    assert main(["plan", str(path), "--gpu", "8"]) == 2
    assert "plan: --gpu must be a size like 8GB, got '8'" in capsys.readouterr().err
