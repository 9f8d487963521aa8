"""What a saved model names on the hub is taken out of the cache; the net is asked only where the caller names it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from laser_fast import LaserModel
from laser_fast.cli import main
from laser_fast.config import LaserConfig, build_config
from laser_fast.data import SequenceDataset, write_dataset
from laser_fast.data.items import ItemTable
from laser_fast.laser.build import build_laser, load_inputs
from laser_fast.laser.laser_files import origin_of
from laser_fast.lm.loading.language_model import load_language_model
from laser_fast.recommenders.recommender_files import load_recommender, save_recommender
from laser_fast.runs.checkpoint import Run, save_laser

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub with one repository: what was asked of it, and a cache that has what was fetched."""

    def __init__(self, lm: Path, cache: Path) -> None:
        self.lm, self.folder = lm, cache / "models--someone--tiny-bert" / "snapshots" / COMMIT
        self.fetched: list[str] = []

    def snapshot_download(self, name: str, *, local_files_only: bool, **_: Any) -> str:
        if not local_files_only:
            self.fetched.append(name)
            shutil.copytree(self.lm, self.folder, dirs_exist_ok=True)
        if not self.folder.exists():
            raise LocalEntryNotFoundError("nothing in the cache")
        return str(self.folder)


@pytest.fixture
def hub(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tiny_lm, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def write_run(settings: dict[str, Any], **lm: str) -> Path:
    """The checkpoint of a run whose language model is said to be `lm`, without any training."""
    config = build_config(LaserConfig, settings)
    inputs = load_inputs(config)
    model = build_laser(config, inputs, *load_language_model(config.lm)).eval()
    model.refresh_items()
    config = config.model_copy(update={"lm": config.lm.model_copy(update=lm)})
    model.origin = replace(origin_of(model), lm=config.lm)
    folder = Path(config.output) / "checkpoint"
    save_laser(model, config, folder, validation={"NDCG@10": 0.5}, stage="phase_a", epoch=0)
    return folder


@pytest.mark.parametrize("what", ["path", "tokenizer"])
def test_nothing_is_fetched_unasked(
    tiny_settings: dict[str, Any], hub: Hub, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    run = write_run(tiny_settings, **{what: "hub:someone/tiny-bert"})
    argument = {"path": "llm", "tokenizer": "tokenizer"}[what]
    message = (
        f"hub:someone/tiny-bert, which the saved model names, .* to fetch it, pass {argument}='hub:someone/tiny-bert'"
    )
    for load in (LaserModel.from_pretrained, Run.load):
        with pytest.raises(ValueError, match=message):
            load(run)
    for command in (["recommend", "--history", "i1"], ["recommend"], ["evaluate"], ["compare"]):
        assert main([command[0], str(run.parent), *command[1:]]) == 2
        assert "which the saved model names, must be in the cache" in capsys.readouterr().err
    assert hub.fetched == []


def test_who_names_it_has_it_fetched_and_then_the_cache_serves(
    tiny_settings: dict[str, Any], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tiny_settings, path="hub:someone/tiny-bert")
    assert main(["recommend", str(run.parent), "--history", "i1", "--llm", "hub:someone/tiny-bert"]) == 0
    assert set(hub.fetched) == {"someone/tiny-bert"}
    hub.fetched.clear()
    model, _, config = Run.load(run)
    assert config.lm.path == "hub:someone/tiny-bert"
    again = LaserModel.from_pretrained(run)
    assert again.recommend([["i1"]], 3) == model.recommend([["i1"]], 3)
    assert origin_of(again).lm.path == origin_of(model).lm.path == "hub:someone/tiny-bert"
    assert hub.fetched == []
    assert Run.load(run, llm="hub:someone/tiny-bert").config.lm.path == "hub:someone/tiny-bert"
    assert set(hub.fetched) == {"someone/tiny-bert"}


def test_the_command_takes_where_the_language_model_is_now(
    tiny_settings: dict[str, Any], tiny_lm: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tiny_settings, path="hub:someone/tiny-bert")
    assert main(["evaluate", str(run.parent), "--llm", str(tiny_lm)]) == 0
    assert "Laser, cosine only" in capsys.readouterr().out
    assert hub.fetched == []


def test_a_folder_that_is_gone_is_no_name_on_the_hub(tiny_settings: dict[str, Any], hub: Hub) -> None:
    run = write_run(tiny_settings, path="models/tiny-bert")
    for load in (LaserModel.from_pretrained, Run.load):
        with pytest.raises(FileNotFoundError, match="must exist, got 'models/tiny-bert'"):
            load(run)
    assert hub.fetched == []


def test_a_folder_of_the_cache_stays_a_folder(
    hub: Hub, tiny_lm: Path, new_laser: Callable[..., LaserModel], tmp_path: Path
) -> None:
    shutil.copytree(tiny_lm, hub.folder)
    new_laser(hub.folder).save_pretrained(tmp_path / "laser")
    assert origin_of(LaserModel.from_pretrained(tmp_path / "laser")).lm.path == str(hub.folder)


def test_local_files_only_is_of_the_tokenizer_too(hub: Hub, new_laser: Callable[..., LaserModel]) -> None:
    with pytest.raises(FileNotFoundError, match="got 'hub:someone/tiny-bert'"):
        new_laser(tokenizer="hub:someone/tiny-bert", local_files_only=True)
    assert hub.fetched == []
    new_laser(tokenizer="hub:someone/tiny-bert")
    assert hub.fetched == ["someone/tiny-bert"]


def test_a_run_is_loaded_with_what_it_was_trained_on(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(tiny_settings)
    dataset = SequenceDataset.load(tiny_settings["data"])
    texts = {**dataset.items.fields, "title": ["red saw", *dataset.items.fields["title"][1:]]}
    arrays = (dataset.user_ids, dataset.offsets, dataset.item_index, dataset.timestamps, dataset.manifest)
    write_dataset(tmp_path / "set", SequenceDataset(ItemTable(dataset.items.ids, texts), *arrays))
    with pytest.raises(ValueError, match="Run.load: the items must have the texts of the training, got other ones"):
        Run.load(run, data=str(tmp_path / "set"))
    other = load_recommender(tiny_settings["recommender"])
    other.item_embedding.weight.data.mul_(1.5)
    save_recommender(other, tmp_path / "other")
    with pytest.raises(ValueError, match="Run.load: recommender must be the SASRec of the training, .*, got a SASRec"):
        Run.load(run, recommender=str(tmp_path / "other"))


def test_package_runs_nothing_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "__init__.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="package 'trap' must contain 'model', got nothing there"):
        LaserModel.from_pretrained("package:trap/model")
