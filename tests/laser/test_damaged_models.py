"""Saved models and recommenders whose files were damaged, swapped, edited or are hostile: refused by name, or equal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from laser_fast import LaserModel
from laser_fast.data import PackedSequences
from laser_fast.files.sealed import seal
from laser_fast.laser.laser_files import SavedLaser, find_saved, weights_hash
from laser_fast.recommenders import SASRec, SequentialRules
from laser_fast.recommenders.packed_recommender import CrossFitted, PackedRecommender, assign_folds
from laser_fast.recommenders.recommender_files import load_recommender, save_recommender
from laser_fast.recommenders.state_spread import StateGap, StateSpread
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration

FILES = ["adapter.safetensors", "items.json", "items.safetensors", "laser.json", "recommender.json"]
FILES += ["recommender.safetensors", "rules.safetensors"]
HUGE = 10**12


@pytest.fixture(scope="module")
def saved(new_laser: Callable[..., LaserModel], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of other weights, rules and calibrations."""
    folder = tmp_path_factory.mktemp("saved")
    for seed in range(2):
        model = new_laser(seed=seed).eval()
        model.refresh_items()
        sequences = PackedSequences.from_lists([[place, (3 * place + 1 + seed) % 25] for place in range(25)])
        rules = SequentialRules.fit(sequences.items, sequences.cu_seqlens, 25)
        settings = Calibration({"laser": 1.0, "rules": 7.0}, ("rules",), history_bias=-3.0 + seed)
        model.calibration = CalibratedScorer({"laser": model, "rules": rules}, settings, torch.zeros(25))
        model.save_pretrained(folder / f"laser{seed}")
    return folder / "laser0", folder / "laser1"


@pytest.fixture
def copied(saved: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "laser"))


def content_of(folder: Path) -> list[Any]:
    """Everything that is read when a model is loaded, without the language model."""
    found = find_saved(folder)
    assert isinstance(found, SavedLaser)
    found.refuse_other_sizes()
    table, recommender, rules = found.items(), found.recommender(), found.tables()["rules"]
    tensors = [torch.from_numpy(found.counts()), rules.bounds, rules.columns, rules.values]
    for name in ("adapter.safetensors", "items.safetensors"):
        tensors.append(torch.frombuffer(bytearray(found.sealed.file(name).read_bytes()), dtype=torch.uint8))
    return [found.description, table.ids, table.fields, weights_hash(recommender), *tensors]


def equal(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_damage_is_refused_or_changes_nothing(copied: Path, damage_files: Callable[..., int]) -> None:
    whole = content_of(copied)
    refused = damage_files(copied, lambda: content_of(copied), lambda found: equal(found, whole), 180)
    assert refused >= 160 - 10  # of nine files one is the card; in the seal there is white space


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_model_is_refused(saved: tuple[Path, Path], copied: Path, name: str) -> None:
    if (copied / name).read_bytes() == (saved[1] / name).read_bytes():
        (copied / name).write_bytes((saved[1] / name).read_bytes().replace(b"0", b"1"))
    else:
        shutil.copy(saved[1] / name, copied / name)
    with pytest.raises(ValueError, match=name):
        LaserModel.from_pretrained(copied)


def test_the_card_may_be_edited_and_other_files_may_lie_beside(saved: tuple[Path, Path], copied: Path) -> None:
    (copied / "README.md").write_text("my model")
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs")
    shutil.copy(copied / "rules.safetensors", copied / "neighbors.safetensors")
    one, other = LaserModel.from_pretrained(copied), LaserModel.from_pretrained(saved[0])
    assert one.recommend([["i1", "i2"]], 5) == other.recommend([["i1", "i2"]], 5)


def rewrite(file: Path, path: str, value: Any) -> None:
    """Change a JSON file and seal its folder again; `...` takes the key out."""
    values = json.loads(file.read_text())
    *parents, last = path.split(".")
    target = values
    for name in parents:
        target = target[name]
    target[last] = value
    if value is ...:
        del target[last]
    file.write_text(json.dumps(values))
    seal(file.parent)


REQUIRED = ["format", "model", "lm", "base", "num_items", "item_map_hash", "split_hash", "recommender", "calibration"]
REQUIRED += ["tables", "config", "facts", "base.tokenizer", "base.vectors", "recommender.saved", "tables.rules.decay"]
REQUIRED += ["calibration.weights", "calibration.history_bias", "calibration.standardize"]


@pytest.mark.parametrize("path", REQUIRED)
def test_a_key_that_was_taken_out_is_missed(copied: Path, path: str) -> None:
    rewrite(copied / "laser.json", path, ...)
    message = (
        "must have format 3, got None; save the model" if path == "format" else f"key '{path}' must be set, got nothing"
    )
    with pytest.raises(ValueError, match=rf"find_saved: .*laser\.json:? {message}"):
        find_saved(copied)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "calibration.weights.rules",
            float("nan"),
            r"calibration\.weights\.rules: Input should be a finite number, got nan",
        ),
        (
            "calibration.history_bias",
            float("-inf"),
            r"calibration\.history_bias: Input should be a finite number, got -inf",
        ),
        ("calibration.weights.rules", "7", r"calibration\.weights\.rules: Input should be a valid number, got '7'"),
        ("format", 1, r"laser\.json must have format 3, got 1; save the model with this version"),
        ("num_items", "25", r"num_items: Input should be a valid integer, got '25'"),
        (
            "num_items",
            HUGE,
            r"item_matrix of shape \(1000000000000, 16\), as its description says, got shape \(25, 16\)",
        ),
        ("item_map_hash", "0" * 64, r"items\.json must hold the 25 items of laser\.json, 000000000000, got 25"),
        ("tables.rules.max_history", 0, r"tables\.rules\.max_history: Input .*, got 0"),
        ("tables.rules.decay", 2.0, r"tables\.rules\.decay: Input .*, got 2\.0"),
        ("tables.popularity", {"decay": 1.0, "max_history": 1}, r"tables\.popularity"),
        ("base.hidden_size", HUGE, r"items\.safetensors must hold item_matrix of shape \(25, 1000000000000\)"),
        (
            "model.mformer.num_experts",
            9,
            r"adapter\.safetensors must hold mformer\.query_experts of shape \(9, 2, 16\)",
        ),
        ("model.mformer.num_queries", 9, r"mformer\.query_experts of shape \(3, 9, 16\).*got shape \(3, 2, 16\)"),
        ("model.mformer.width", 64, r"mformer\.query_experts of shape \(3, 2, 64\)"),
        ("model.mformer.num_layers", 9, r"mformer\.qformer\.layers\.8\.\S+ of shape .*got none"),
        ("model.bituning.num_suffix_tokens", 9, r"bituning\.suffix_tokens of shape \(9, 16\)"),
        ("model.text.max_history", 9, r"text\.recency of shape \(9,\)"),
        ("model.bituning.prefix_mode", "kv", r"deep_prefix\.down\.weight of shape \(64, 16\).*got none"),
        ("model.mformer.widht", 16, "unknown key 'model.mformer.widht', did you mean 'model.mformer.width'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) and " " not in value else None,
)
def test_a_description_that_is_not_true_is_refused_at_once(copied: Path, path: str, value: Any, message: str) -> None:
    rewrite(copied / "laser.json", path, value)
    with pytest.raises(ValueError, match=message):
        content_of(copied)


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "must hold finite numbers, got nan to nan": lambda values: torch.where(values == values.max(), torch.nan, values),
    "must hold finite numbers, got .* to inf": lambda values: torch.where(values == values.max(), torch.inf, values),
    "must hold .* in float.*, got .*int32": lambda values: values.view(torch.int32),
}


@pytest.mark.parametrize("message", BROKEN)
@pytest.mark.parametrize(("name", "part"), [("adapter", "head.weight"), ("items", "item_matrix")])
def test_weights_that_are_no_numbers_are_refused_before_a_model_is_changed(
    copied: Path, saved: tuple[Path, Path], name: str, part: str, message: str
) -> None:
    file = copied / f"{name}.safetensors"
    tensors = load_file(file)
    save_file(tensors | {part: BROKEN[message](tensors[part])}, file)
    seal(copied)
    model, found = LaserModel.from_pretrained(saved[1]), find_saved(copied)
    assert found is not None
    before = model.weights.now()
    with pytest.raises(ValueError, match=message):
        found.put_into(model)
    assert model.weights.now() == before and not model.items_are_outdated


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    model = SASRec(10, width=8, num_layers=1, max_length=6)
    save_recommender(model, tmp_path / "model")
    torch.nn.init.constant_(model.item_embedding.weight, float("nan"))
    with pytest.raises(ValueError, match=r"write_tensors: recommender\.safetensors must hold finite numbers, got nan"):
        save_recommender(model, tmp_path / "model")
    assert load_recommender(tmp_path / "model").item_embedding.weight.isfinite().all()


@pytest.fixture
def recommender(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = SASRec(10, width=8, num_layers=1, max_length=6).eval()
    models = [model.twin().eval() for _ in range(3)]
    bases = torch.eye(8).expand(3, 8, 8).contiguous()
    model.cross_fitted = CrossFitted(models, assign_folds(20, 3, 0), None, bases)
    model.gap = StateGap(7, 0.6, 0.12, 0.11, None, {"valid": StateSpread(2.0, 0.5, 0.1, 1.0)})
    save_recommender(model, tmp_path / "model")
    return tmp_path / "model"


def test_a_damaged_recommender_is_refused_or_equal(recommender: Path, damage_files: Callable[..., int]) -> None:
    def content(model: PackedRecommender) -> list[Any]:
        folds = model.cross_fitted
        assert folds is not None and folds.bases is not None
        hashes = [weights_hash(each) for each in (model, *folds.models)]
        return [hashes, model.gap, model.split_hash, torch.from_numpy(folds.user_folds), folds.bases]

    whole = content(load_recommender(recommender))
    times = damage_files(
        recommender, lambda: load_recommender(recommender), lambda found: equal(content(found), whole), 120
    )
    assert times > 110


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *[
            (name, ..., f"key '{name}' must be set, got nothing")
            for name in ("kind", "model", "gap", "folds", "item_map_hash", "folds.items")
        ],
        ("model.width", ..., r"must hold all settings of sasrec, got none of \['width'\]"),
        ("model.depth", 3, r"must hold settings of sasrec, got .*depth"),
        ("model.width", "8", r"must hold settings of sasrec, got"),
        ("model.width", 0, "width must be at least 1, got 0"),
        ("model.num_items", HUGE, r"item_embedding\.weight of shape \(1000000000000, 8\).*got shape \(10, 8\)"),
        ("model.width", 10**30, r"must hold settings of sasrec, got"),
        ("model.num_layers", HUGE, "must have as many num_layers as .* has weights of, got 1000000000000"),
        ("folds.number", HUGE, r"folds\.number: Input .*, got 1000000000000"),
        ("folds.number", 4, r"_folds\.safetensors must hold the weights of 4 folds of this sasrec, got missing \['3\."),
        ("gap.in_sample", float("nan"), r"gap\.in_sample: Input .*, got nan"),
        ("gap.states", {"valid": {"norm": 1.0}}, r"key 'gap\.states\.valid\.norm_deviation' must be set, got nothing"),
    ],
    ids=str,
)
def test_a_recommender_that_is_not_as_it_says_is_refused_at_once(
    recommender: Path, path: str, value: Any, message: str
) -> None:
    rewrite(recommender / "recommender.json", path, value)
    with pytest.raises(ValueError, match=message):
        load_recommender(recommender)


def test_a_calibration_that_is_not_finite_is_not_saved(saved: tuple[Path, Path], tmp_path: Path) -> None:
    model = LaserModel.from_pretrained(saved[0])
    assert model.calibration is not None
    object.__setattr__(model.calibration.calibration, "last_bias", float("nan"))
    with pytest.raises(ValueError, match=r"write_laser: laser\.json: calibration\.last_bias: .*got nan"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "place", "value", "got"),
    [
        ("columns", 0, 25, r"columns in 0\.\.24, got 0\.\.25"),
        ("columns", 0, -1, r"columns in 0\.\.24, got -1\.\.24"),
        ("bounds", 3, 900, r"bounds that rise from 0 to 25, got 0 to 25 with 1 falls"),
        ("bounds", 0, 1, r"bounds that rise from 0 to 25, got 1 to 25 with \d falls"),
        ("values", 0, float("inf"), "must hold finite numbers, got .* to inf in values"),
    ],
)
def test_rules_that_point_elsewhere_are_refused(copied: Path, name: str, place: int, value: float, got: str) -> None:
    tensors = load_file(copied / "rules.safetensors")
    tensors[name][place] = value
    save_file(tensors, copied / "rules.safetensors")
    seal(copied)
    with pytest.raises(ValueError, match=rf"rules\.safetensors .*{got}$"):
        LaserModel.from_pretrained(copied)


@pytest.mark.parametrize("counts", [torch.zeros(25), -torch.ones(25, dtype=torch.int64)], ids=["float", "negative"])
def test_counts_that_are_none_are_refused(copied: Path, counts: torch.Tensor) -> None:
    save_file(load_file(copied / "items.safetensors") | {"counts": counts}, copied / "items.safetensors")
    seal(copied)
    with pytest.raises(ValueError, match=r"counts of items\.safetensors must be int64 and not negative, got"):
        LaserModel.from_pretrained(copied)


def test_a_model_without_an_item_matrix_comes_back(new_laser: Callable[..., LaserModel], tmp_path: Path) -> None:
    model = new_laser().eval()
    model.save_pretrained(tmp_path / "laser")
    loaded = LaserModel.from_pretrained(tmp_path / "laser")
    assert loaded.item_matrix.shape == (0, 16)
    assert torch.equal(loaded.refresh_items(), model.refresh_items())
