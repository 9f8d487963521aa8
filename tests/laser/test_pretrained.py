"""Building a model in one call, saving it, loading it: the same vectors, or a refusal that says what differs."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from laser_fast import LaserModel
from laser_fast.config import LaserConfig, build_config, dump_config
from laser_fast.data import ItemTable, PackedSequences, SequenceDataset, leave_one_out
from laser_fast.files.sealed import seal
from laser_fast.recommenders import GRU4Rec, ItemKNN, SASRec, SequentialRules
from laser_fast.recommenders.recommender_files import load_recommender
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration
from laser_fast.retrieval.requests import pack_histories
from laser_fast.runs.checkpoint import Run
from laser_fast.training.train import train_laser

HISTORIES = [["i1", "i2"], [], ["i7", "i3", "i20"]]


def vectors(model: LaserModel) -> list[torch.Tensor]:
    users = model.encode_users(pack_histories(HISTORIES, model.index_of_item))
    return [users, model.encode_items(), model.item_matrix]


def same(first: LaserModel, second: LaserModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vectors(first), vectors(second), strict=True))


@pytest.fixture
def saved(new_laser: Callable[..., LaserModel], tmp_path: Path) -> tuple[LaserModel, Path]:
    model = new_laser()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().refresh_items()
    model.save_pretrained(tmp_path / "laser")
    return model, tmp_path / "laser"


def test_a_saved_model_gives_identical_vectors(saved: tuple[LaserModel, Path]) -> None:
    model, folder = saved
    before = torch.get_rng_state()
    loaded = LaserModel.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing from the caller's generator
    assert same(loaded, model) and not loaded.training
    assert loaded.recommend(HISTORIES, 3) == model.recommend(HISTORIES, 3)
    loaded.save_pretrained(folder)  # over itself
    assert same(LaserModel.from_pretrained(str(folder)), model)


def test_a_linear_prefix_is_saved_with_the_recommender_it_reads(
    new_laser: Callable[..., LaserModel], tmp_path: Path
) -> None:
    model = new_laser(config_of={"bituning": {"prefix": "linear"}})
    model.eval().refresh_items()
    model.save_pretrained(tmp_path / "laser")
    loaded = LaserModel.from_pretrained(tmp_path / "laser")
    assert same(loaded, model) and loaded.linear_prefix is not None and loaded.mformer is None
    assert loaded.recommend(HISTORIES, 3) == model.recommend(HISTORIES, 3)
    assert "Prefix: a linear map of the newest state of a frozen SASRec" in (
        tmp_path / "laser" / "README.md"
    ).read_text(encoding="utf-8")
    with pytest.raises(TypeError, match="items must map ids to texts, got a list"):
        new_laser(items=["one title", "another"])
    with pytest.raises(FileNotFoundError, match="resolve_path: recommender must exist, got 'nowhere'"):
        new_laser(recommender="nowhere")
    with pytest.raises(ValueError, match='recommender must be given when bituning.prefix is "linear", got None'):
        new_laser(recommender=None, config_of={"bituning": {"prefix": "linear"}})


def test_only_what_was_trained_is_written(saved: tuple[LaserModel, Path], tiny_lm: Path) -> None:
    model, folder = saved
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter.safetensors",
        "items.json",
        "items.safetensors",
        "laser.json",
        "recommender.json",
        "recommender.safetensors",
        "seal.json",
    }
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    description = json.loads((folder / "laser.json").read_text())
    assert description["lm"]["path"] == str(tiny_lm)
    assert description["base"]["type"] == "BertModel" and description["base"]["hidden_size"] == 16
    assert description["item_map_hash"] == ItemTable(model.item_ids).hash()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: laser_fast") and "25 items" in card and "3 query experts" in card


def test_the_calibration_comes_along(saved: tuple[LaserModel, Path]) -> None:
    model, folder = saved
    assert model.recommender is not None and model.origin is not None
    sasrec = model.recommender.recommender
    settings = Calibration({"laser": 1.0, "recommender": 0.5}, ("recommender",), history_bias=-3.0)
    counts = torch.arange(25)
    object.__setattr__(model.origin, "counts", counts.numpy())
    model.calibration = CalibratedScorer({"laser": model, "recommender": sasrec}, settings, counts)
    model.save_pretrained(folder)
    loaded = LaserModel.from_pretrained(folder)
    assert loaded.calibration is not None and loaded.calibration.calibration == settings
    assert loaded.recommend(HISTORIES, 5) == model.recommend(HISTORIES, 5)


def test_rules_and_neighbours_of_the_calibration_come_along(saved: tuple[LaserModel, Path]) -> None:
    model, folder = saved
    sequences = PackedSequences.from_lists([[place, (3 * place + 1) % 25, place] for place in range(25)])
    rules = SequentialRules.fit(sequences.items, sequences.cu_seqlens, 25, decay=0.7, max_history=4)
    settings = Calibration({"laser": 1.0, "rules": 7.0, "neighbors": 90.0})
    neighbors = ItemKNN.fit(sequences.items, sequences.cu_seqlens, 25, max_history=3)
    parts = {"laser": model, "rules": rules, "neighbors": neighbors}
    model.calibration = CalibratedScorer(parts, settings, torch.zeros(25))
    model.save_pretrained(folder)
    loaded = LaserModel.from_pretrained(folder)
    assert loaded.calibration is not None and loaded.calibration.calibration == settings
    known = loaded.calibration.components["rules"]
    assert isinstance(known, SequentialRules) and (known.decay, known.max_history) == (0.7, 4)
    assert isinstance(loaded.calibration.components["neighbors"], ItemKNN)
    assert loaded.recommend(HISTORIES, 5) == model.recommend(HISTORIES, 5)
    for left_out in ("rules", "neighbors"):
        without = Calibration({**settings.weights, left_out: 0.0})
        model.calibration = CalibratedScorer(parts, without, torch.zeros(25)).without_unused(["rules", "neighbors"])
        assert set(model.calibration.components) == set(parts) - {left_out}
        assert loaded.recommend(HISTORIES, 5) != model.recommend(HISTORIES, 5)
    save_file(
        {"bounds": torch.zeros(4), "columns": rules.columns, "values": rules.values}, folder / "rules.safetensors"
    )
    seal(folder)
    with pytest.raises(ValueError, match=r"rules\.safetensors must be of 25 items, got 3"):
        LaserModel.from_pretrained(folder)


def test_a_recommender_that_only_calibrates_comes_along(
    new_laser: Callable[..., LaserModel], tiny_recommender: Path, tmp_path: Path
) -> None:
    model = new_laser(recommender=None, config_of={"bituning": {"prefix": "shared"}})
    model.refresh_items()
    sasrec = load_recommender(tiny_recommender)
    settings = Calibration({"laser": 1.0, "recommender": 0.5})
    model.calibration = CalibratedScorer({"laser": model, "recommender": sasrec}, settings, torch.zeros(25))
    model.save_pretrained(tmp_path / "laser")
    loaded = LaserModel.from_pretrained(tmp_path / "laser")
    assert loaded.recommend(HISTORIES, 5) == model.eval().recommend(HISTORIES, 5)


def test_a_training_run_is_a_saved_model(tiny_settings: dict[str, Any]) -> None:
    config = build_config(LaserConfig, tiny_settings | {"training": {"phase_a": {"epochs": 1}, "batch_size": 16}})
    model, _ = train_laser(config, progress=False)
    for folder in (Path(config.output), Path(config.output) / "checkpoint"):
        loaded = LaserModel.from_pretrained(folder)
        assert same(loaded, model)
        assert loaded.recommend(HISTORIES, 4) == model.recommend(HISTORIES, 4)  # calibrated
    loaded.save_pretrained(Path(config.output).parent / "adapter")
    with pytest.raises(ValueError, match="Run.load: adapter must come from a training run, got a model saved on its"):
        Run.load(Path(config.output).parent / "adapter")


def test_it_can_be_built_from_loaded_parts(
    new_laser: Callable[..., LaserModel], tiny_lm: Path, tiny_data: Path, tiny_recommender: Path, tmp_path: Path
) -> None:
    reference = new_laser()
    dataset = SequenceDataset.load(tiny_data)
    split = leave_one_out(dataset)
    counts = np.bincount(split.train.items, minlength=25)
    (tmp_path / "config.yaml").write_text(dump_config(reference.origin.config))
    loaded = AutoModel.from_pretrained(tiny_lm)
    model = new_laser(
        pretrained=loaded,
        tokenizer=AutoTokenizer.from_pretrained(tiny_lm),
        items=dataset.items,
        recommender=load_recommender(tiny_recommender),
        config=tmp_path / "config.yaml",
        item_counts=counts,
    )
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in reference.state_dict().items())
    assert model.origin is not None and model.origin.split_hash == split.hash
    assert torch.equal(torch.from_numpy(model.builder.known_items), torch.from_numpy(counts > 0))
    model.refresh_items()
    model.save_pretrained(tmp_path / "laser")
    again = LaserModel.from_pretrained(tmp_path / "laser", llm=loaded, tokenizer=str(tiny_lm))
    assert same(again, model.eval())
    # transformers keeps the folder a model came from, so nothing needs to be said
    assert same(LaserModel.from_pretrained(tmp_path / "laser"), model)


def another_lm(tiny_lm: Path, folder: Path, change: str) -> Path:
    shutil.copytree(tiny_lm, folder)
    weights = load_file(folder / "model.safetensors")
    if change == "weights":
        weights["embeddings.word_embeddings.weight"] *= 1.05
    if change == "norms":
        weights["encoder.layer.1.output.LayerNorm.weight"] *= 1.05
    if change == "rounding":
        weights = {name: value.bfloat16().to(value.dtype) for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if change == "tokenizer":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"drill"', '"drills"'))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights", r"got other weights \(embeddings\)$"),
        ("norms", r"got other weights \(vectors\)$"),
        ("tokenizer", r"got tokenizer [0-9a-f]{12} instead of [0-9a-f]{12}$"),
    ],
)
def test_another_base_is_refused(
    saved: tuple[LaserModel, Path], tiny_lm: Path, tmp_path: Path, change: str, message: str
) -> None:
    with pytest.raises(ValueError, match="must be the BertModel this Laser was trained with, " + message):
        LaserModel.from_pretrained(saved[1], llm=another_lm(tiny_lm, tmp_path / "other", change))


def test_a_base_of_another_shape_is_refused_with_all_differences(
    saved: tuple[LaserModel, Path], tiny_lm: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    llama = LlamaModel(LlamaConfig(vocab_size=16, **sizes))
    with pytest.raises(ValueError, match="type LlamaModel instead of BertModel, hidden_size 32 instead of 16"):
        LaserModel.from_pretrained(saved[1], llm=llama, tokenizer=str(tiny_lm))


def test_rounded_weights_are_the_same_base(saved: tuple[LaserModel, Path], tiny_lm: Path, tmp_path: Path) -> None:
    loaded = LaserModel.from_pretrained(saved[1], llm=another_lm(tiny_lm, tmp_path / "other", "rounding"))
    known = vectors(saved[0])[0]
    difference = (vectors(loaded)[0] - known).norm() / known.norm()
    assert 0 < float(difference) < 0.1  # rounded, and no more than that


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_packed_base_is_the_same_base(
    saved: tuple[LaserModel, Path], new_laser: Callable[..., LaserModel], tmp_path: Path
) -> None:
    packed = LaserModel.from_pretrained(saved[1], quantization="nf4")
    difference = (vectors(packed)[0] - vectors(saved[0])[0]).abs().max()
    assert float(difference) > 1e-4  # it is packed
    packed.save_pretrained(tmp_path / "packed")
    again = LaserModel.from_pretrained(tmp_path / "packed")  # packed again: as it was saved
    assert same(again, packed)
    LaserModel.from_pretrained(tmp_path / "packed", quantization="none", dtype="bfloat16")
    with pytest.raises(ValueError, match="quantization: Input should be 'none' or 'nf4', got 'int8'"):
        LaserModel.from_pretrained(saved[1], quantization="int8")
    assert new_laser(dtype="bfloat16").lm.dtype == torch.bfloat16


def test_a_gru4rec_comes_along(new_laser: Callable[..., LaserModel], tmp_path: Path) -> None:
    torch.manual_seed(1)
    gru = GRU4Rec(25, width=6, max_length=10)
    model = new_laser(recommender=gru).eval()
    model.refresh_items()
    model.save_pretrained(tmp_path / "laser")
    loaded = LaserModel.from_pretrained(tmp_path / "laser")
    assert loaded.recommender is not None and isinstance(loaded.recommender.recommender, GRU4Rec)
    assert same(loaded, model)
    with pytest.raises(ValueError, match="recommender must be the GRU4Rec of the training, [0-9a-f]{12}, got a SASRec"):
        LaserModel.from_pretrained(tmp_path / "laser", recommender=SASRec(25, width=6, num_heads=1, max_length=10))


def test_another_recommender_is_refused(
    saved: tuple[LaserModel, Path], new_laser: Callable[..., LaserModel], tiny_recommender: Path
) -> None:
    torch.manual_seed(1)
    other = SASRec(25, width=8, num_layers=1, max_length=10)
    with pytest.raises(ValueError, match="recommender must be the SASRec of the training, [0-9a-f]{12}, got a SASRec"):
        LaserModel.from_pretrained(saved[1], recommender=other)
    assert same(LaserModel.from_pretrained(saved[1], recommender=tiny_recommender), saved[0])
    other.item_map_hash = "0" * 64
    with pytest.raises(ValueError, match="recommender must know the items of this catalogue in this order, .*got 0000"):
        new_laser(recommender=other)


class NotATransformer:
    """Nor a module."""

    num_items, state_size, split_hash = 25, 4, None

    def states(self, items: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(items % 4, 4).float()

    def score(self, items: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(cu_seqlens) - 1, 25)


def test_a_recommender_of_ones_own_must_be_brought_along(new_laser: Callable[..., LaserModel], tmp_path: Path) -> None:
    model = new_laser(recommender=NotATransformer()).eval()
    model.refresh_items()
    model.save_pretrained(tmp_path / "laser")
    with pytest.raises(ValueError, match="must be given for this Laser, which reads a NotATransformer that"):
        LaserModel.from_pretrained(tmp_path / "laser")
    assert same(LaserModel.from_pretrained(tmp_path / "laser", recommender=NotATransformer()), model)


def test_what_is_missing_or_too_much_is_refused(
    new_laser: Callable[..., LaserModel], saved: tuple[LaserModel, Path], tiny_lm: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="items must be given .* unless pretrained is a saved Laser, got None"):
        new_laser(items=None)
    with pytest.raises(ValueError, match='recommender must be given when bituning.prefix is "mformer", got None'):
        new_laser(recommender=None)
    with pytest.raises(ValueError, match="config must be left out for a saved Laser"):
        LaserModel.from_pretrained(saved[1], config={})
    with pytest.raises(ValueError, match="llm must be left out for a new Laser"):
        new_laser(llm=tiny_lm)
    with pytest.raises(ValueError, match=r"item_counts must be 25 counts, one for each item, got shape \(3,\)"):
        new_laser(item_counts=[1, 2, 3])
    with pytest.raises(ValueError, match="unknown key 'mformer.widht', did you mean 'mformer.width'"):
        new_laser(config={"mformer": {"widht": 16}})
    foreign = AutoTokenizer.from_pretrained(tiny_lm)
    foreign.add_tokens(["red"[:2], "blu"])
    with pytest.raises(ValueError, match="the tokenizer must give tokens below 16, the rows of .*, got 1[67]; use the"):
        new_laser(tokenizer=foreign)
    nameless = AutoModel.from_pretrained(tiny_lm)
    nameless.name_or_path = nameless.config._name_or_path = ""
    with pytest.raises(ValueError, match="tokenizer must be given with a loaded language model, got None"):
        new_laser(pretrained=nameless)
    with pytest.raises(FileNotFoundError, match="the path must exist"):
        new_laser(pretrained=tmp_path / "nowhere")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    refused = "the folder must be new, empty or hold what this function saves alone, got '{}' at .*; choose another"
    with pytest.raises(FileExistsError, match=refused.format("thesis.txt")):
        saved[0].save_pretrained(precious)
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    saved[0].save_pretrained(tmp_path / "run" / "checkpoint")
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(FileExistsError, match=refused.format("checkpoint', 'config.yaml")):
        saved[0].save_pretrained(tmp_path / "run")  # which is read as the model in it, but is more
    saved[0].save_pretrained(tmp_path / "run" / "checkpoint")
    saved[0].origin = None
    with pytest.raises(RuntimeError, match="save_pretrained: the model must know what it was built from"):
        saved[0].save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with the repository someone/tiny-bert, and no way to the net."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny-bert"
    shutil.copytree(tiny_lm, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def test_names_of_the_hub(new_laser: Callable[..., LaserModel], hub: Path, tmp_path: Path) -> None:
    model = new_laser(pretrained="someone/tiny-bert").eval()
    model.refresh_items()
    model.save_pretrained(tmp_path / "laser")
    description = json.loads((tmp_path / "laser" / "laser.json").read_text())
    assert description["lm"]["path"] == "hub:someone/tiny-bert"
    assert description["base"]["revision"] == COMMIT
    card = (tmp_path / "laser" / "README.md").read_text()
    assert "base_model: someone/tiny-bert" in card and 'llm="hub:someone/tiny-bert")' in card
    assert same(LaserModel.from_pretrained(tmp_path / "laser"), model)
    for name in ("hub:someone/tiny-bert", f"hub:someone/tiny-bert@{COMMIT}"):
        assert same(LaserModel.from_pretrained(tmp_path / "laser", llm=name), model)
    with pytest.raises(FileNotFoundError, match="must be an existing folder or a repository of the hub, got 'no/body'"):
        new_laser(pretrained="no/body")


def test_an_upload_is_what_would_be_saved(
    saved: tuple[LaserModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[dict[str, Any]] = []

    def upload_folder(self: Any, *, folder_path: Path, **arguments: Any) -> str:
        shutil.copytree(folder_path, tmp_path / "uploaded")
        uploads.append(arguments)
        return "a commit"

    class Repository:
        repo_id = "me/laser"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert saved[0].push_to_hub("me/laser", model_card_kwargs={"figures": {"NDCG@10": 0.5}}) == "a commit"
    assert uploads[0]["repo_id"] == "me/laser"
    assert "| NDCG@10 | 0.5000 |" in (tmp_path / "uploaded" / "README.md").read_text()
    assert same(LaserModel.from_pretrained(tmp_path / "uploaded"), saved[0])
    assert "25 items" in saved[0].generate_model_card().text


def test_it_is_saved_where_a_link_points_and_by_one_process(
    saved: tuple[LaserModel, Path],
    claimed_elsewhere: Callable[[Path], AbstractContextManager[None]],
    tmp_path: Path,
) -> None:
    place = tmp_path / "place"
    (place / "disk").mkdir(parents=True)
    (place / "link").symlink_to(place / "disk")
    for _ in range(2):
        saved[0].save_pretrained(place / "link")
    assert (place / "disk" / "laser.json").is_file() and (place / "link").is_symlink()
    assert sorted(path.name for path in place.iterdir()) == ["disk", "link"]
    with claimed_elsewhere(place / "disk"), pytest.raises(ValueError, match="one process at a time, got '.*/disk'"):
        saved[0].save_pretrained(place / "link")
