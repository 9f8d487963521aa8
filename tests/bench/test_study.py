"""The study from end to end on tiny data: runs are kept, differences are paired, figures are those of the rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study
import torch
import yaml
from studying import runs
from studying.results import markdown, report_of
from studying.variants import CACHED, REFERENCE, VARIANTS

from laser_fast.config import LaserConfig, build_config
from laser_fast.evaluation import evaluate, rank_values
from laser_fast.laser import LaserModel
from laser_fast.laser.build import build_laser, load_inputs, load_language_model
from laser_fast.models.text_scorers import CatalogueTexts
from laser_fast.recommenders import Popularity


@pytest.fixture
def config_file(tiny_settings: dict[str, Any], tmp_path: Path) -> Path:
    training = {**tiny_settings["training"], "text": {"epochs": 1}, "pretrain": {"epochs": 0}}
    training["phase_a"] = {"epochs": 1, "rows_per_epoch": 8}
    settings = {**tiny_settings, "text": {"residual": True, "item_side": "text"}, "training": training}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_study_is_run_once_and_says_what_it_measured(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, name in ((CatalogueTexts, "vectors"), (LaserModel, "encode_users")):
        monkeypatch.setattr(place, name, getattr(place, name))  # put back afterwards
    out, work = tmp_path / "out.json", tmp_path / "work"
    arguments = ["study", "--config", str(config_file), "--work", str(work), "--seeds", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*arguments, "--variants", CACHED, REFERENCE])
    study.main()
    first = capsys.readouterr().out
    assert f"{REFERENCE}, seed 1: " in first and "no-training fusion" in first
    study.main()
    assert "seed 1:" not in capsys.readouterr().out  # nothing was trained again
    report = json.loads(out.read_text())
    inputs = load_inputs(build_config(LaserConfig, yaml.safe_load(config_file.read_text())))
    train = torch.tensor(inputs.split.train.items), torch.tensor(inputs.split.train.cu_seqlens)
    popularity = evaluate(Popularity.fit(*train, inputs.dataset.num_items), inputs.split.test)["NDCG@10"]
    assert report["lines"]["Popularity"]["NDCG@10"]["mean"] == pytest.approx(popularity.mean)
    figures = report["variants"][REFERENCE]["systems"]["with ID score"]["NDCG@10"]
    assert figures["mean"] == pytest.approx(np.mean(figures["seeds"])) and len(figures["seeds"]) == 2
    difference = report["variants"][REFERENCE]["differences"][CACHED][""]["NDCG@10"]
    kept = {name: [json.loads((work / f"{name}-{seed}.json").read_text()) for seed in (0, 1)] for name in FOLDERS}
    values = {
        name: torch.stack([rank_values(torch.tensor(run[""]["ranks"]), "NDCG@10") for run in both]).mean(dim=0)
        for name, both in kept.items()
    }
    paired = values["shared-prefix"] - values["cached-text-line"]
    assert difference["mean"] == pytest.approx(float(paired.mean()))
    assert difference["standard_error"] == pytest.approx(float(paired.std()) / len(paired) ** 0.5)
    (work / "cached-text-line-1.json").unlink()
    wanted = [*arguments, "--kept", "--questions", "--markdown", "--variants", CACHED, REFERENCE, "no prefix"]
    monkeypatch.setattr("sys.argv", wanted)
    study.main()
    table = capsys.readouterr().out
    assert "seed 1:" not in table and not (work / "cached-text-line-1.json").exists()  # nothing was trained for it
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [row[:3] for row in rows] == [
        [CACHED, VARIANTS[CACHED].question, "1"],
        [REFERENCE, VARIANTS[REFERENCE].question, "2"],
    ]
    first_seeds = [rank_values(torch.tensor(kept[name][0][""]["ranks"]), "NDCG@10") for name in FOLDERS]
    assert rows[0][head.index("against")] == REFERENCE and rows[1][head.index("against")] == ""
    shown = rows[0][head.index("calibrated, difference")]
    assert float(shown.split(" ± ")[0]) == pytest.approx(
        float((first_seeds[1] - first_seeds[0]).mean()), abs=6e-5
    )  # of the seed that both have


FOLDERS = ("shared-prefix", "cached-text-line")


def test_users_are_encoded_once_for_the_same_weights(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(LaserConfig, yaml.safe_load(config_file.read_text()))
    inputs = load_inputs(config)
    model = build_laser(config, inputs, *load_language_model(config.lm)).eval()
    histories = inputs.split.test.histories
    expected = model.encode_users(histories)
    encoded: list[int] = []
    plain = LaserModel.encode_users

    def counting(self: LaserModel, asked: Any, **options: Any) -> Any:
        encoded.append(len(asked))
        return plain(self, asked, **options)

    monkeypatch.setattr(LaserModel, "encode_users", counting)
    runs.encode_users_once()
    torch.testing.assert_close(model.encode_users(histories.select(range(4))), expected[:4])
    torch.testing.assert_close(model.encode_users(histories), expected)
    different = len({histories[row].tobytes() for row in range(len(histories))})
    assert sum(encoded) <= len(histories) and sum(encoded) >= different
    torch.testing.assert_close(model.encode_users(histories), expected)
    assert encoded[-1] == 0
    with torch.no_grad():
        model.bituning.suffix_tokens.add_(1.0)
    assert not torch.allclose(model.encode_users(histories), expected) and encoded[-1] > 0


def test_without_test_rows_no_row_is_ranked_by_scalars_fitted_on_it(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = load_inputs(build_config(LaserConfig, yaml.safe_load(config_file.read_text()))).split
    open_ended = type(split)(split.train, split.train_users, split.valid, split.test.select([]), "", "")
    fitted: list[np.ndarray] = []
    search = runs.fit_calibration

    def watched(parts: Any, rows: Any, counts: Any, **options: Any) -> Any:
        fitted.append(rows.users)
        return search(parts, rows, counts, **options)

    monkeypatch.setattr(runs, "fit_calibration", watched)
    num_items = int(split.train.items.max()) + 1
    scorer = Popularity.fit(torch.tensor(split.train.items), torch.tensor(split.train.cu_seqlens), 40 + num_items)
    ranked = runs.rank({"laser": scorer}, open_ended, torch.ones(40 + num_items))
    assert np.array(ranked["ranks"]).shape == (len(split.valid), 20)
    halves = fitted[1:]
    assert [len(half) for half in halves] == [len(split.valid) // 2, (len(split.valid) + 1) // 2]
    assert not set(halves[0]) & set(halves[1])


def test_variants_are_settings_the_library_knows(config_file: Path) -> None:
    values = yaml.safe_load(config_file.read_text())
    base = build_config(LaserConfig, values).model_dump(mode="json")
    for variant in VARIANTS.values():
        settings = [f"{key}={json.dumps(value)}" for key, value in variant.settings.items()]
        changed = runs.apply_overrides(json.loads(json.dumps(base)), settings)
        build_config(LaserConfig, changed)
        assert changed != base or variant.recommender or variant.name == "M-Former, cross-fitted states"
        assert variant.against in VARIANTS


def test_the_page_has_the_table(config_file: Path) -> None:
    config = build_config(LaserConfig, yaml.safe_load(config_file.read_text()))
    entry = {"valid": 0.5, "ranks": [1, 2, 30]}
    page = markdown(report_of(config, {"lines": {"a line": entry}}, "a command"))
    assert page.splitlines()[2].startswith("| a line | 0.5000 | HR@10 0.6667 ± 0.3333, NDCG@10 0.5436 ±")


def test_it_starts_from_a_clone_as_it_is_documented(tmp_path: Path) -> None:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HOME": str(tmp_path)}
    command = [sys.executable, str(study.__file__), "--help"]
    printed = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, check=True).stdout
    assert "--variants" in printed and "--kept" in printed
