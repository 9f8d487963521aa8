"""Checkpoints of RecBole's SASRec and GRU4Rec and of LLaRA's SASRec.

Only tensors and plain values are read, from safetensors or by torch's restricted reader, which runs no code of the
file. The rows of the item tables are put into the order of the data set.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laser_fast.data.items import ItemTable
from laser_fast.files.tensors import open_tensors
from laser_fast.recommenders.importers.weight_layouts import LAYOUTS, Layout, Weights
from laser_fast.recommenders.packed_recommender import PackedRecommender


@dataclass(frozen=True)
class ImportReport:
    """What was taken from a checkpoint."""

    kind: str
    source: str  # name of the file
    sha256: str
    items_in_checkpoint: int  # without the padding
    items_dropped: int  # those that the data set does not have
    same_order: bool  # as the data set, by the caller's word and not by an item map
    settings: dict[str, Any]
    assumed: list[str]  # settings that neither the file nor the caller told: the published defaults

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        order = "taken to be in the order of the data set" if self.same_order else "found by the item map"
        lines = [
            f"{self.source} (sha256 {self.sha256[:12]}) is a {self.kind}: {settings}",
            f"{self.items_in_checkpoint} items, {order}; {self.items_dropped} of them are not in the data set",
        ]
        if self.assumed:
            lines.append(f"not told by the file, so taken to be the published default: {', '.join(self.assumed)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def import_recommender(
    checkpoint: str | Path,
    kind: str,
    items: ItemTable,
    *,
    item_map: Mapping[int, str] | None = None,
    same_order: bool = False,
    **settings: Any,
) -> tuple[PackedRecommender, ImportReport]:
    """The model of a foreign checkpoint, over the items of a data set.

    Args:
        checkpoint: safetensors, or a file of torch with a state_dict, alone or under the key "state_dict" with
            RecBole's settings as a plain dictionary under "config".
        kind: a key of `LAYOUTS`.
        items: the catalogue; the model's items are in its order.
        item_map: external id of every index of the checkpoint, as in RecBole's `dataset.field2id_token`.
        same_order: without `item_map`: the checkpoint's items are these items in this order.
        settings: what the weights do not tell: `num_heads` (of a SASRec), `activation` (RecBole's "hidden_act"),
            `max_length` (of a GRU4Rec); None for not given.

    Returns:
        (the model on the CPU in eval mode, float32, with `item_map_hash` and without `split_hash`; the report).

    Raises:
        FileNotFoundError: no such file.
        ValueError: all keys, shapes, settings and items that do not fit, in one message.
    """
    path = Path(checkpoint)
    if kind not in LAYOUTS:
        raise ValueError(f"import_recommender: kind must be one of {', '.join(LAYOUTS)}, got {kind!r}")
    weights, config = _read_weights(path)
    layout, problems = LAYOUTS[kind], list[str]()
    names, num_items = layout.names(weights), layout.num_items(weights)
    if missing := sorted(names.keys() - weights.keys()):
        problems.append(f"missing keys {missing}")
    if unexpected := sorted(weights.keys() - names.keys()):
        problems.append(f"unexpected keys {unexpected}")
    rows = torch.empty(0, dtype=torch.int64)
    if num_items > 0:
        known = range(layout.first_item, layout.first_item + num_items)
        rows = _rows(known, items, item_map, same_order, problems)
    given = {name: value for name, value in settings.items() if value is not None}
    asked, assumed = _asked(layout, given, config, problems)
    values = {"num_items": len(items), **layout.settings(weights), **asked}
    model = None if problems else _build(layout, weights, rows, values, problems)
    if model is None or problems:
        raise ValueError(
            f"import_recommender: {path.name} must be a {kind} of these {len(items)} items, got " + "; ".join(problems)
        )
    model.item_map_hash = items.hash()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    of_items = num_items, num_items - len(items), item_map is None
    return model.eval(), ImportReport(kind, path.name, digest, *of_items, dict(model.settings), assumed)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, and its settings where it has them as a plain dictionary."""
    if not path.is_file():
        raise FileNotFoundError(f"import_recommender: checkpoint must be a file, got {str(path)!r}")
    if path.suffix == ".safetensors":
        with open_tensors(path, "import_recommender") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, {}  # noqa: SIM118 - not a dictionary
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file from elsewhere can fail in any way
        raise ValueError(
            f"import_recommender: {path.name} must hold tensors and plain values alone, got {_culprit(error)}; where "
            "the file is trusted and its program installed, load it there and write "
            '`torch.save(model.state_dict(), "weights.pth")`, or for a checkpoint of RecBole '
            '`torch.save({"state_dict": checkpoint["state_dict"]}, "weights.pth")`'
        ) from error
    config: dict[str, Any] = {}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        config = dict(content["config"]) if isinstance(content.get("config"), Mapping) else {}
        content = content["state_dict"]
    named = content.items() if isinstance(content, Mapping) else ()
    wrong = [f"{name!r}: {type(value).__name__}" for name, value in named if not isinstance(value, Tensor)]
    if wrong or not isinstance(content, Mapping):
        found = ", ".join(wrong[:3]) or f"a {type(content).__name__}"
        raise ValueError(f"import_recommender: {path.name} must hold a state_dict, names with tensors, got {found}")
    return dict(content), config


def _culprit(error: Exception) -> str:
    """What the restricted reader met; its own message recommends to lift the restriction."""
    found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"class (\S+)", str(error))
    return f"an object of {found[1]}" if found else f"what torch cannot read ({type(error).__name__})"


def _rows(
    known: range, items: ItemTable, item_map: Mapping[int, str] | None, same_order: bool, problems: list[str]
) -> Tensor:
    """Row of each item of the data set in the checkpoint's item tables, int64 [I]; faults go to `problems`."""
    if item_map is None:
        if not same_order:
            problems.append(
                f"no item map for its {len(known)} items; give one, or state that they are in the order of the data set"
            )
        elif len(known) != len(items):
            problems.append(f"{len(known)} items, so they cannot be in the same order")
        return torch.arange(len(items)) + known.start
    padding = 0 if known.start else known.stop
    external = {index: name for index, name in item_map.items() if index != padding}
    row_of = {name: index for index, name in external.items()}
    if outside := [index for index in external if index not in known]:
        problems.append(
            f"{len(outside)} indices of the item map outside {known.start}..{known.stop - 1}, e.g. {outside[0]}"
        )
    if repeated := [name for index, name in external.items() if row_of[name] != index]:
        problems.append(f"the item map names {repeated[0]!r} twice")
    if missing := [name for name in items.ids if name not in row_of]:
        problems.append(f"{len(missing)} items of the data set not in the item map, e.g. {missing[0]!r}")
    return torch.tensor([row_of.get(name, known.start) for name in items.ids], dtype=torch.int64)


def _asked(
    layout: Layout, given: Mapping[str, Any], config: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """The settings that weights do not tell, and the names of those that are published defaults."""
    values, assumed = dict[str, Any](), []
    for name, (their_name, default) in layout.asked.items():
        told = config.get(their_name)
        if name in given and told is not None and given[name] != told:
            problems.append(f"{name} {given[name]} against {told} in the file")
        values[name] = given.get(name, told)
        if values[name] is None and default is None:
            problems.append(f"no {name}, which the weights do not tell")
        elif values[name] is None:
            values[name] = default
            assumed.append(name)
    problems += [f"{name}, which it has no use for" for name in given if name not in layout.asked]
    return values, assumed


def _build(
    layout: Layout, weights: Weights, rows: Tensor, settings: dict[str, Any], problems: list[str]
) -> PackedRecommender | None:
    """The model with these weights and the items of `rows`; faults go to `problems`."""
    try:
        with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
            model = layout.model(**settings)
    except (TypeError, ValueError) as error:
        problems.append(str(error))
        return None
    own, state = model.state_dict(), {}
    for theirs, ours in layout.names(weights).items():
        tensor, expected = weights[theirs], own[ours].shape
        of_items = ours.startswith(("item_embedding.", "output."))
        if of_items:  # the embeddings have a row for the padding as well
            number = layout.num_items(weights) + ours.startswith("item_embedding.")
            expected = torch.Size([number, *expected[1:]])
        if tensor.dim() == 3 and tensor.shape[2:] == (1,):  # a convolution over one place is a linear map
            tensor = tensor[:, :, 0]
        if tensor.shape != expected:
            problems.append(f"{theirs} of shape {tuple(weights[theirs].shape)} instead of {tuple(expected)}")
        elif not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            problems.append(f"{theirs} with values that are no finite floating-point numbers")
        else:
            state[ours] = (tensor[rows] if of_items else tensor).float()
    if not problems:
        model.load_state_dict(state)
    return model
