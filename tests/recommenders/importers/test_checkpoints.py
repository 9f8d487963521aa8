"""Checkpoints from elsewhere: read without running them, in the order of the data set, refused in one message."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from laser_fast.data import ItemTable
from laser_fast.recommenders import GRU4Rec
from laser_fast.recommenders.importers.checkpoints import import_recommender
from laser_fast.recommenders.importers.weight_layouts import LAYOUTS
from laser_fast.recommenders.recommender_files import load_recommender, save_recommender

# the data set has three of the five items of a checkpoint, in another order
ITEMS = ItemTable(["c", "e", "a"])
RECBOLE_MAP = {0: "[PAD]", 1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}
LLARA_MAP = {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
WIDTH, HIDDEN = 8, 3
Weights = Callable[..., dict[str, Tensor]]


def _options(kind: str) -> dict[str, Any]:
    return {} if kind == "recbole-gru4rec" else {"num_heads": 2}


def _map(kind: str) -> dict[int, str]:
    return LLARA_MAP if kind == "llara-sasrec" else RECBOLE_MAP


def _scores(model: Any, items: ItemTable, *ids: str) -> dict[str, float]:
    packed = torch.from_numpy(items.index_of(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
    return dict(zip(items.ids, model.score(*packed)[0].tolist(), strict=True))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_items_are_put_into_the_order_of_the_data_set(kind: str, tmp_path: Path, foreign_weights: Weights) -> None:
    torch.save({"state_dict": foreign_weights(kind), "epoch": 3}, tmp_path / "best.pth")
    save_file(foreign_weights(kind), tmp_path / "best.safetensors")
    all_items = ItemTable(["a", "b", "c", "d", "e"])
    whole, _ = import_recommender(tmp_path / "best.pth", kind, all_items, same_order=True, **_options(kind))
    for name in ("best.pth", "best.safetensors"):
        model, report = import_recommender(tmp_path / name, kind, ITEMS, item_map=_map(kind), **_options(kind))
        expected = _scores(whole, all_items, "e", "a", "c")
        assert _scores(model, ITEMS, "e", "a", "c") == pytest.approx({name: expected[name] for name in ITEMS.ids})
        assert (report.items_in_checkpoint, report.items_dropped, report.same_order) == (5, 2, False)
        assert "5 items, found by the item map; 2 of them are not in the data set" in str(report)
        assert model.item_map_hash == ITEMS.hash() and model.split_hash is None and not model.training
    save_recommender(model, tmp_path / "taken", imported=report.to_dict())
    loaded = load_recommender(tmp_path / "taken", expected_item_map_hash=ITEMS.hash())
    assert type(loaded) is type(model) and _scores(loaded, ITEMS, "e", "a") == _scores(model, ITEMS, "e", "a")
    with pytest.raises(ValueError, match="split_hash must be 1234, got None; .*import it as trained on this split if"):
        load_recommender(tmp_path / "taken", expected_split_hash="1234")


def test_recbole_gru4rec_equals_a_padded_gru(tmp_path: Path, foreign_weights: Weights) -> None:
    weights = {name: tensor.float() for name, tensor in foreign_weights("recbole-gru4rec").items()}
    torch.save(weights, tmp_path / "gru.pth")
    model, report = import_recommender(tmp_path / "gru.pth", "recbole-gru4rec", ITEMS, item_map=RECBOLE_MAP)
    gru = torch.nn.GRU(WIDTH, HIDDEN, bias=False, batch_first=True)
    gru.load_state_dict({name.removeprefix("gru_layers."): w for name, w in weights.items() if "gru" in name})
    padded = torch.tensor([[5, 1, 0], [3, 0, 0]])  # e a, c
    states = gru(weights["item_embedding.weight"][padded])[0] @ weights["dense.weight"].T + weights["dense.bias"]
    scores = states[[0, 1], [1, 0]] @ weights["item_embedding.weight"][[3, 5, 1]].T
    packed = torch.tensor([1, 2, 0]), torch.tensor([0, 2, 3], dtype=torch.int32)
    torch.testing.assert_close(model.score(*packed), scores, rtol=1e-5, atol=1e-5)
    assert isinstance(model, GRU4Rec) and report.assumed == ["max_length"] and model.max_length == 50
    assert "taken to be the published default: max_length" in str(report)


def test_everything_that_does_not_fit_is_in_one_message(tmp_path: Path, foreign_weights: Weights) -> None:
    weights = foreign_weights("recbole-sasrec")
    del weights["LayerNorm.bias"]
    torch.save(weights | {"extra": torch.zeros(2)}, tmp_path / "best.pth")
    other = ItemTable(["a", "x"])
    with pytest.raises(ValueError) as caught:
        import_recommender(
            tmp_path / "best.pth", "recbole-sasrec", other, item_map={1: "a", 2: "a", 9: "y"}, max_length=3
        )
    for part in (
        "best.pth must be a recbole-sasrec of these 2 items, got missing keys ['LayerNorm.bias']; "
        "unexpected keys ['extra']",
        "1 indices of the item map outside 1..5, e.g. 9",
        "the item map names 'a' twice",
        "1 items of the data set not in the item map, e.g. 'x'",
        "no num_heads, which the weights do not tell",
        "max_length, which it has no use for",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "change", "options", "message"),
    [
        ("llara-sasrec", {}, {"item_map": None}, "no item map for its 5 items; give one, or state that they are in"),
        ("llara-sasrec", {}, {"item_map": None, "same_order": True}, "got 5 items, so they cannot be in the same"),
        ("llara-sasrec", {"s_fc.weight": torch.zeros(4, WIDTH)}, {}, r"s_fc.weight of shape \(4, 8\) instead of \(5,"),
        ("llara-sasrec", {"ln_1.bias": torch.full((WIDTH,), torch.nan)}, {}, "ln_1.bias with values that are no"),
        ("llara-sasrec", {}, {"num_heads": 3}, "width must be a multiple of num_heads, got 8 and 3"),
        ("recbole-sasrec", {}, {"activation": "mish"}, "activation must be one of gelu, .*, got 'mish'"),
        ("recbole-gru4rec", {"dense.weight": None}, {}, r"missing keys \['dense.weight'\]"),
        ("recbole-sasrec", {"trm_encoder.layer.999999999.x": torch.zeros(1)}, {}, r"unexpected keys \['trm_encoder"),
        ("bert4rec", {}, {}, "kind must be one of recbole-sasrec, recbole-gru4rec, llara-sasrec, got 'bert4rec'"),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str, change: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path, foreign_weights: Weights
) -> None:
    weights = {**foreign_weights(kind), **change}
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, tmp_path / "w.pt")
    settings = {"item_map": _map(kind), **_options(kind), **options}
    with pytest.raises(ValueError, match=message):
        import_recommender(tmp_path / "w.pt", kind, ITEMS, **settings)


def test_settings_beside_the_weights_are_read(tmp_path: Path, foreign_weights: Weights) -> None:
    config = {"n_heads": 2, "hidden_act": "relu", "layer_norm_eps": 1e-6, "learning_rate": 0.1}
    torch.save({"state_dict": foreign_weights("recbole-sasrec"), "config": config}, tmp_path / "best.pth")
    model, report = import_recommender(tmp_path / "best.pth", "recbole-sasrec", ITEMS, item_map=RECBOLE_MAP)
    told = {"num_heads": 2, "activation": "relu", "norm_eps": 1e-6, "inner_width": 12}
    assert {name: model.settings[name] for name in told} == told
    assert report.assumed == []
    with pytest.raises(ValueError, match="got num_heads 1 against 2 in the file"):
        import_recommender(tmp_path / "best.pth", "recbole-sasrec", ITEMS, item_map=RECBOLE_MAP, num_heads=1)


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_leaves_no_trace(tmp_path: Path, foreign_weights: Weights) -> None:
    trace = tmp_path / "trace"
    for name, zipped in (("new.pth", True), ("old.pth", False)):
        content = {"state_dict": foreign_weights("llara-sasrec"), "config": _Trap(trace)}
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"{name} must hold tensors and .* alone, got an object of posix"):
            import_recommender(tmp_path / name, "llara-sasrec", ITEMS, item_map=LLARA_MAP, num_heads=1)
        assert not trace.exists()
    assert zipfile.is_zipfile(tmp_path / "new.pth") and not zipfile.is_zipfile(tmp_path / "old.pth")
    torch.load(tmp_path / "new.pth", weights_only=False)  # the trap works: without the restriction it snaps
    assert trace.exists()


def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "SASRec.pt")
    with pytest.raises(ValueError, match=r"an object of torch.nn.*Sequential; where .* `torch.save\(model.state_dict"):
        import_recommender(tmp_path / "SASRec.pt", "llara-sasrec", ITEMS, same_order=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", b"", "w.pt must hold tensors and plain values alone, got what torch cannot read"),
        ("w.pt", b"garbage", "w.pt must hold tensors and plain values alone"),
        ("w.safetensors", b"garbage", "w.safetensors must be a whole safetensors file"),
        ("w.pt", None, "checkpoint must be a file, got"),
        ("w.pt", {"epoch": 3, "best": "yes"}, "a state_dict, names with tensors, got 'epoch': int, 'best': str"),
        ("w.pt", torch.zeros(3), "must hold a state_dict, names with tensors, got a Tensor"),
    ],
    ids=["empty", "garbage", "no-safetensors", "nowhere", "no-tensors", "one-tensor"],
)
def test_what_is_no_checkpoint_is_refused(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=message):
        import_recommender(tmp_path / name, "llara-sasrec", ITEMS, same_order=True)
