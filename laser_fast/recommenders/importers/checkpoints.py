"""Recommenders trained elsewhere: checkpoints of RecBole's SASRec and GRU4Rec and of LLaRA's SASRec.

Tensors are read and nothing else: a `.pt` or `.pth` file by torch's restricted reader, which runs no code of the file,
or safetensors. The rows of their item tables are put into the order of the data set, so no index is ever shifted later.
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
from laser_fast.recommenders.importers.weight_layouts import LAYOUTS, Layout
from laser_fast.recommenders.packed_recommender import PackedRecommender

KINDS = tuple(LAYOUTS)
"""What can be imported."""


@dataclass(frozen=True)
class ImportReport:
    """What was taken from a checkpoint, and what was not in it.

    Attributes:
        kind: one of `KINDS`.
        source: name of the file.
        sha256: of the file.
        items_in_checkpoint: items it knows, without the padding.
        items_dropped: of these, those the data set does not have.
        same_order: nobody gave an item map; its order was stated to be that of the data set.
        settings: the model's.
        assumed: settings that neither the file nor the caller told, and that were taken to be the published defaults.
    """

    kind: str
    source: str
    sha256: str
    items_in_checkpoint: int
    items_dropped: int
    same_order: bool
    settings: dict[str, Any]
    assumed: list[str]

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
    """A model that computes what the one in a foreign checkpoint computes, over the items of a data set.

    Args:
        checkpoint: safetensors, or a file of torch that holds a state_dict, alone or under the key "state_dict" (and
            beside it, if need be, RecBole's settings as a plain dictionary under "config").
        kind: "recbole-sasrec", "recbole-gru4rec" or "llara-sasrec".
        items: the catalogue; the model's items are in its order.
        item_map: external id of every index of the checkpoint, as RecBole's `dataset.field2id_token` has them.
        same_order: without `item_map`: the checkpoint's items are these items in this order.
        settings: what the weights do not tell: `num_heads` (of a SASRec), `activation` (RecBole's "hidden_act"),
            `max_length` (of a GRU4Rec). None = not given.

    Returns:
        (the model on the CPU in eval mode, float32, its `item_map_hash` set and its `split_hash` None; the report).

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown kind; a file that holds more than tensors and plain values; or, all in one message,
            missing and unexpected keys, shapes, settings and items that do not fit.
    """
    path = Path(checkpoint)
    if kind not in LAYOUTS:
        raise ValueError(f"import_recommender: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    weights, config = read_weights(path)
    layout = LAYOUTS[kind](weights)
    problems = layout.key_problems(weights)
    rows = torch.empty(0, dtype=torch.int64)
    if layout.num_items > 0:
        rows, of_items = _rows(layout, items, item_map, same_order)
        problems += of_items
    values, assumed, unknown = layout.settings(
        {name: value for name, value in settings.items() if value is not None}, config
    )
    problems += unknown
    model = None
    if not problems:
        model, problems = layout.build(weights, rows, {"num_items": len(items), **values})
    if model is None or problems:
        raise ValueError(
            f"import_recommender: {path.name} must be a {kind} of these {len(items)} items, got " + "; ".join(problems)
        )
    model.item_map_hash = items.hash()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    dropped = layout.num_items - len(items)
    report = ImportReport(
        kind, path.name, digest, layout.num_items, dropped, item_map is None, dict(model.settings), assumed
    )
    return model.eval(), report


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint and, where it has them as a plain dictionary, its settings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no checkpoint, or it would have to be unpickled; nothing in it was run.
    """
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
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"import_recommender: {path.name} must hold a state_dict, names with tensors, got {_shown(content)}"
        )
    return dict(content), config


def _culprit(error: Exception) -> str:
    """What the restricted reader met, in few words; its own message recommends to switch the restriction off."""
    found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"class (\S+)", str(error))
    if found:
        return f"an object of {found.group(1)}"
    return f"what torch cannot read ({type(error).__name__})"


def _shown(content: object) -> str:
    if isinstance(content, Mapping):
        wrong = [
            f"{name!r}: {type(value).__name__}" for name, value in content.items() if not isinstance(value, Tensor)
        ]
        return ", ".join(wrong[:3])
    return f"a {type(content).__name__}"


def _rows(
    layout: Layout, items: ItemTable, item_map: Mapping[int, str] | None, same_order: bool
) -> tuple[Tensor, list[str]]:
    """Row of every item of the data set in the checkpoint's item tables, int64 [I], and what is wrong with the map."""
    first, count = layout.first_item, layout.num_items
    if item_map is None:
        if not same_order:
            return torch.empty(0, dtype=torch.int64), [
                f"no item map for its {count} items; give one, or state that they are in the order of the data set"
            ]
        problems = [] if count == len(items) else [f"{count} items, so they cannot be in the same order"]
        return torch.arange(len(items)) + first, problems
    known = {index: external for index, external in item_map.items() if index != layout.padding}
    outside = [index for index in known if not first <= index < first + count]
    row_of = {external: index for index, external in known.items()}
    problems = []
    if outside:
        problems.append(
            f"{len(outside)} indices of the item map outside {first}..{first + count - 1}, e.g. {outside[0]}"
        )
    if len(row_of) < len(known):
        repeated = next(external for index, external in known.items() if row_of[external] != index)
        problems.append(f"the item map names {repeated!r} twice")
    if missing := [external for external in items.ids if external not in row_of]:
        problems.append(f"{len(missing)} items of the data set not in the item map, e.g. {missing[0]!r}")
    return torch.tensor([row_of.get(external, first) for external in items.ids], dtype=torch.int64), problems
