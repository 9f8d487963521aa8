"""`laser-fast recommender train --kind gru4rec` and `recommender import`, as a user types them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from laser_fast.data import SequenceDataset, leave_one_out
from laser_fast.recommenders import GRU4Rec
from laser_fast.recommenders.recommender_files import load_recommender

_ITEMS = 25
Command = Callable[..., str]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_data: Path) -> Path:
    """A random GRU4Rec under RecBole's names, over the items of `tiny_data` in reverse; its item map beside it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"item_embedding.weight": (_ITEMS + 1, 4), "dense.weight": (4, 6), "dense.bias": (4,)}
    shapes |= {"gru_layers.weight_ih_l0": (18, 4), "gru_layers.weight_hh_l0": (18, 6)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save({"state_dict": weights, "config": {"MAX_ITEM_LIST_LENGTH": 20}}, tmp_path / "best.pth")
    ids = ["[PAD]", *reversed(SequenceDataset.load(tiny_data).items.ids)]
    (tmp_path / "map.json").write_text(json.dumps(ids))
    return tmp_path / "best.pth"


def test_gru4rec_is_trained(tiny_data: Path, tmp_path: Path, command: Command) -> None:
    arguments = ("--kind", "gru4rec", "--set", "width=4", "--set", "epochs=1")
    printed = command("recommender", "train", tiny_data, tmp_path / "gru", *arguments)
    assert "GRU4Rec, validation" in printed
    assert isinstance(load_recommender(tmp_path / "gru"), GRU4Rec)


def test_import(tiny_data: Path, checkpoint: Path, tmp_path: Path, command: Command) -> None:
    take = ("recommender", "import", "--kind", "recbole-gru4rec", "--item-map", tmp_path / "map.json", checkpoint)
    printed = command(*take, tiny_data, tmp_path / "out")
    assert "25 items, found by the item map; 0 of them are not in the data set" in printed
    assert "Laser's training refuses it without --trained-on-this-split" in printed
    assert "recbole-gru4rec, validation" in printed
    dataset = SequenceDataset.load(tiny_data)
    split = leave_one_out(dataset).hash
    with pytest.raises(ValueError, match=f"split_hash must be {split}, got None"):
        load_recommender(tmp_path / "out", expected_split_hash=split)
    command(*take, tiny_data, tmp_path / "known", "--trained-on-this-split")
    model = load_recommender(tmp_path / "known", expected_split_hash=split, expected_item_map_hash=dataset.items.hash())
    assert model.max_length == 20
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]["item_embedding.weight"]
    assert torch.equal(model.item_embedding.weight.flip(0), weights[1:])  # the data set's order, not theirs
    imported = json.loads((tmp_path / "known" / "recommender.json").read_text())["facts"]["imported"]
    assert imported["source"] == "best.pth" and len(imported["sha256"]) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no item map for its 25 items; give one, or state that they are in the order of the data set"),
        (["--item-map", "nowhere.json"], "item map must be a file"),
        (["--same-order", "--num-heads", "2"], "got num_heads, which it has no use for"),
    ],
)
def test_what_is_refused_leaves_no_folder(
    options: list[str], message: str, tiny_data: Path, checkpoint: Path, command: Command
) -> None:
    output = checkpoint.parent / "out"
    take = ("recommender", "import", checkpoint, tiny_data, output, "--kind", "recbole-gru4rec")
    assert message in command(*take, *options, status=2)
    assert not output.exists()
    output.mkdir()
    assert "output must be a new folder" in command(*take, "--same-order", status=2)
