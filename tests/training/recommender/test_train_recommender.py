"""Training SASRec and GRU4Rec on made-up data, and their checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from laser_fast.config import RecommenderConfig
from laser_fast.data import EvaluationRows, PackedSequences, Split
from laser_fast.evaluation import evaluate
from laser_fast.files.sealed import seal
from laser_fast.nn.evaluation_mode import draws_dropout
from laser_fast.recommenders import GRU4Rec, SASRec
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.recommender_files import load_recommender, save_recommender
from laser_fast.training.recommender.train_recommender import train_recommender

_NUM_ITEMS = 30
_CONFIG = RecommenderConfig(
    width=32,
    num_layers=1,
    dropout=0.1,
    state_dropout=0.1,
    max_length=5,
    batch_size=32,
    learning_rate=5e-3,
    epochs=25,
    patience=25,
    folds=0,
)


def _split(users: int = 150) -> Split:
    """Every user walks along one fixed cycle through the catalogue: the next item is a function of the last."""
    generator = np.random.default_rng(0)
    cycle = generator.permutation(_NUM_ITEMS)
    walks = [cycle[(start + np.arange(length)) % _NUM_ITEMS] for start, length in generator.integers(4, 12, (users, 2))]

    def rows(back: int) -> EvaluationRows:
        histories = PackedSequences.from_lists([walk[:-back] for walk in walks])
        return EvaluationRows(np.arange(users), histories, np.array([walk[-back] for walk in walks], dtype=np.int64))

    train = PackedSequences.from_lists([walk[:-2] for walk in walks])
    return Split(train, np.arange(users), rows(2), rows(1), "leave-one-out", "a hash")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedRecommender, Path]:
    run_dir = tmp_path_factory.mktemp("runs") / "sasrec"
    model = train_recommender(
        _split(), _NUM_ITEMS, _CONFIG, seed=0, item_map_hash="a map", run_dir=run_dir, progress=False
    )
    return model, run_dir


def test_it_learns_what_follows(trained: tuple[PackedRecommender, Path]) -> None:
    assert evaluate(trained[0], _split().test)["HR@1"].mean > 0.9


def test_the_best_weights_are_kept(trained: tuple[PackedRecommender, Path]) -> None:
    model, run_dir = trained
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(len(lines)))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    best = max(line["valid"]["NDCG@10"]["mean"] for line in lines)
    assert evaluate(model, _split().valid)["NDCG@10"].mean == pytest.approx(best, abs=1e-9)
    assert not model.training
    assert {"config.yaml", "environment.json", "checkpoint"} <= {path.name for path in run_dir.iterdir()}


def test_one_seed_one_result() -> None:
    config = _CONFIG.model_copy(update={"epochs": 2, "dropout": 0.3})
    torch.manual_seed(1)
    first = train_recommender(_split(), _NUM_ITEMS, config, seed=5, progress=False).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = train_recommender(_split(), _NUM_ITEMS, config, seed=5, progress=False).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = train_recommender(_split(), _NUM_ITEMS, config, seed=6, progress=False).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["item_embedding.weight"], other["item_embedding.weight"])


def test_training_stops_when_nothing_improves(tmp_path: Path) -> None:
    config = _CONFIG.model_copy(update={"learning_rate": 1e-12, "epochs": 50, "patience": 3})
    train_recommender(_split(), _NUM_ITEMS, config, seed=0, run_dir=tmp_path / "run", progress=False)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_every_event_but_the_first_is_a_target_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    longest: list[int] = []
    forward = SASRec.forward

    def spy(self: SASRec, items: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        if draws_dropout(self):  # it is trained, not asked
            longest.append(int(cu_seqlens.diff().max()))
            seen.extend(items.tolist())
        return forward(self, items, cu_seqlens)

    monkeypatch.setattr(SASRec, "forward", spy)
    config = _CONFIG.model_copy(update={"max_length": 2, "epochs": 1})
    split = _split()
    train_recommender(split, _NUM_ITEMS, config, seed=0, progress=False)
    inputs = np.concatenate([sequence[:-1] for sequence in split.train.to_lists()])
    assert sorted(seen) == sorted(inputs.tolist())
    assert max(longest) == 2


def test_no_sequence_to_learn_from() -> None:
    split = _split()
    short = PackedSequences.from_lists([[1], [], [2]])
    empty = Split(short, np.arange(3), split.valid, split.test, split.rule, split.hash)
    with pytest.raises(ValueError, match="a training sequence must have two events, got none"):
        train_recommender(empty, _NUM_ITEMS, _CONFIG, seed=0, progress=False)


def test_a_loss_that_is_not_finite_stops_with_the_step() -> None:
    config = _CONFIG.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match=r"the loss must be finite, got (nan|inf) at step \d+"):
        train_recommender(_split(), _NUM_ITEMS, config, seed=0, progress=False)


def test_a_checkpoint_gives_the_same_model(trained: tuple[PackedRecommender, Path], tmp_path: Path) -> None:
    model, run_dir = trained
    for _ in range(2):  # the second replaces the first
        save_recommender(model, tmp_path / "again")
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))  # and nothing beside it
    assert names == [
        "again",
        *(f"again/{name}" for name in ("recommender.json", "recommender.safetensors", "seal.json")),
    ]
    with pytest.raises(
        FileExistsError, match="save_recommender: the folder must be new, .* got 'checkpoint', 'config.yaml',"
    ):
        save_recommender(model, run_dir)
    rows = _split().test.histories
    packed = torch.from_numpy(rows.items), torch.from_numpy(rows.cu_seqlens)
    for folder in (run_dir, run_dir / "checkpoint", tmp_path / "again"):
        loaded = load_recommender(folder, expected_split_hash="a hash", expected_item_map_hash="a map")
        assert torch.equal(loaded.score(*packed), model.score(*packed))
        assert (loaded.split_hash, loaded.item_map_hash, loaded.settings) == ("a hash", "a map", model.settings)
        assert not loaded.training


def test_another_split_or_catalogue_is_refused(trained: tuple[PackedRecommender, Path]) -> None:
    with pytest.raises(ValueError, match="split_hash must be another hash, got a hash; train the recommender"):
        load_recommender(trained[1], expected_split_hash="another hash")
    with pytest.raises(ValueError, match="item_map_hash must be another map, got a map"):
        load_recommender(trained[1], expected_item_map_hash="another map")


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_recommender(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"the folder must hold recommender\.json"):
        load_recommender(tmp_path)


def test_foreign_weights_are_refused(trained: tuple[PackedRecommender, Path], tmp_path: Path) -> None:
    save_recommender(trained[0], tmp_path / "model")
    path = tmp_path / "model" / "recommender.safetensors"
    weights = load_file(path)
    save_file({("foreign" if name == "norm.bias" else name): value for name, value in weights.items()}, path)
    seal(tmp_path / "model")
    with pytest.raises(ValueError, match=r"got missing \['norm\.bias'\], unexpected \['foreign'\]"):
        load_recommender(tmp_path / "model")
    save_file({**weights, "norm.bias": torch.zeros(3)}, path)
    seal(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"hold norm\.bias of shape \(32,\), as its description says, got shape \(3,\)"
    ):
        load_recommender(tmp_path / "model")
    path.write_bytes(b"\x80\x04not safetensors")
    seal(tmp_path / "model")
    with pytest.raises(ValueError, match=r"recommender\.safetensors must be a whole safetensors file"):
        load_recommender(tmp_path / "model")


def test_another_kind_is_refused(trained: tuple[PackedRecommender, Path], tmp_path: Path) -> None:
    save_recommender(trained[0], tmp_path / "model")
    path = tmp_path / "model" / "recommender.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "bert4rec"}))
    message = "must be of a kind out of sasrec, gru4rec, .*, got 'bert4rec'"
    with pytest.raises(ValueError, match=message):
        load_recommender(tmp_path / "model")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(ValueError, match=r"recommender\.json must have format 2, got 1; train it, or import it, again"):
        load_recommender(tmp_path / "model")


def test_gru4rec_is_trained_saved_and_loaded_by_the_same_functions(tmp_path: Path) -> None:
    update = {"kind": "gru4rec", "epochs": 25}
    model = train_recommender(
        _split(), _NUM_ITEMS, _CONFIG.model_copy(update=update), seed=0, run_dir=tmp_path / "gru", progress=False
    )
    assert isinstance(model, GRU4Rec) and model.settings["hidden_width"] == 64 and model.settings["num_layers"] == 1
    assert evaluate(model, _split().test)["HR@1"].mean > 0.9
    loaded = load_recommender(tmp_path / "gru", expected_split_hash="a hash")
    assert isinstance(loaded, GRU4Rec) and loaded.settings == model.settings
    rows = _split().test.histories
    packed = torch.from_numpy(rows.items), torch.from_numpy(rows.cu_seqlens)
    assert torch.equal(loaded.score(*packed), model.score(*packed))
    with pytest.raises(ValueError, match="split_hash must be other, got a hash; .* or import it as trained on this sp"):
        load_recommender(tmp_path / "gru", expected_split_hash="other")
