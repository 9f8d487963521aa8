"""A trained Laser in a folder: safetensors and JSON, whole or absent; nothing of the frozen language model.

laser.json               settings, which language model it belongs to, hashes, calibration
adapter.safetensors      what was trained (`LaserModel.state_dict`)
items.safetensors        the item matrix V that belongs to it, how often each item was seen in training, and the text
                         vectors of the residual, where there is one
items.json               the catalogue: external ids and text fields in index order
recommender.*            the frozen recommender that M-Former reads, where it reads one
rules.safetensors        the sequential rules of the calibrated score, where it has some
neighbors.safetensors    its item neighbours, where it has some
README.md                a model card
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laser_fast.config import LanguageModelConfig, ModelConfig, build_config
from laser_fast.data.folders import replace_directory, whole_directory, write_json
from laser_fast.data.items import ItemTable
from laser_fast.models.base_model import differences
from laser_fast.models.item_to_item import ItemKNN, ItemToItem, SequentialRules
from laser_fast.models.packed_recommender import PackedRecommender
from laser_fast.models.recommender_files import is_saved_by_kind, read_recommender, write_recommender

if TYPE_CHECKING:
    from laser_fast.models.laser import LaserModel

_FORMAT = 2
_DESCRIPTION = "laser.json"
_TABLES: dict[str, type[ItemToItem]] = {"rules": SequentialRules, "neighbors": ItemKNN}
_IN_RUN = "checkpoint"


@dataclass(frozen=True, eq=False)
class Origin:
    """What a model was built from; recorded when it is saved and compared when it is loaded.

    Attributes:
        config: settings of the model.
        lm: where the language model was loaded from, and how.
        base: what the language model is, see `describe_base`.
        items: the catalogue.
        counts: int64 [I], events of each item in the training part; zeros where nobody counted.
        split_hash: of the split it was trained on; None if unknown.
    """

    config: ModelConfig
    lm: LanguageModelConfig
    base: dict[str, Any]
    items: ItemTable
    counts: np.ndarray
    split_hash: str | None = None


@dataclass(frozen=True, eq=False)
class SavedLaser:
    """A folder written by `write_laser`; files are read when they are asked for.

    Attributes:
        description: laser.json.
    """

    folder: Path
    description: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        """Settings of the model."""
        return build_config(ModelConfig, self.description["model"])

    @property
    def lm(self) -> LanguageModelConfig:
        """Where the language model was."""
        return build_config(LanguageModelConfig, self.description["lm"])

    def items(self) -> ItemTable:
        """The catalogue."""
        values = _read_json(self.folder / "items.json")
        return ItemTable(values["ids"], values["fields"])

    def counts(self) -> np.ndarray:
        """Events of each item in the training part: int64 [I]."""
        counts: np.ndarray = _read_tensors(self.folder / "items.safetensors")["counts"].numpy()
        return counts

    def recommender(self) -> PackedRecommender | None:
        """The recommender that was saved with the model; None where there is none in the folder."""
        return read_recommender(self.folder) if (self.description["recommender"] or {}).get("saved") else None

    def tables(self) -> dict[str, ItemToItem]:
        """The rules and neighbours that the calibrated score adds, by their name in it.

        Raises:
            ValueError: a file is damaged or belongs to another catalogue.
        """
        found = {}
        for name, settings in self.description.get("tables", {}).items():
            values = _read_tensors(self.folder / f"{name}.safetensors")
            table = _TABLES[name](values["bounds"], values["columns"], values["values"], **settings)
            if table.num_items != self.description["num_items"]:
                raise ValueError(
                    f"checkpoint: {name}.safetensors must be of {self.description['num_items']} items, "
                    f"got {table.num_items}"
                )
            found[name] = table
        return found

    def refuse_another_base(self, model: "LaserModel") -> None:
        """Make sure that a model stands on the language model and the tokenizer this one was trained with.

        Raises:
            ValueError: it does not; lists the differences.
        """
        expected = self.description["base"]
        if found := differences(expected, origin_of(model).base):
            raise ValueError(
                f"from_pretrained: the language model must be the {expected['type']} this Laser was trained with, got "
                + ", ".join(found)
            )

    def put_into(self, model: "LaserModel") -> None:
        """Trained parameters and item matrix into a model of the same shape.

        Raises:
            ValueError: a file is damaged, or belongs to another catalogue or other settings.
        """
        if self.description["item_map_hash"] != item_map_hash(model.item_ids):
            raise ValueError(
                f"load_weights: {self.folder.name} must belong to this catalogue of {model.num_items} items, "
                f"got another item map, of {self.description['num_items']} items"
            )
        state = _read_tensors(self.folder / "adapter.safetensors")
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"load_weights: {self.folder.name} must fit the configuration, got {error}") from error
        items = _read_tensors(self.folder / "items.safetensors")
        if model.text is not None and "text_vectors" in items:
            model.text.set_vectors(items["text_vectors"])
        model.item_matrix = items["item_matrix"].to(model.device)  # last: it belongs to all that stands before it

    def put_text_into(self, model: "LaserModel") -> None:
        """The trained text residual and its vectors alone, and the weight of popularity where both have one.

        Raises:
            ValueError: a file is damaged, or one of the two models has no text residual.
        """
        vectors = _read_tensors(self.folder / "items.safetensors").get("text_vectors")
        if model.text is None or vectors is None:
            raise ValueError(f"put_text_into: {self.folder.name} and the model must have a text residual, got none")
        state = _read_tensors(self.folder / "adapter.safetensors")
        prefix = "text."
        model.text.load_state_dict({n[len(prefix) :]: value for n, value in state.items() if n.startswith(prefix)})
        model.text.set_vectors(vectors)
        if model.popularity_weight is not None and "popularity_weight" in state:
            with torch.no_grad():
                model.popularity_weight.copy_(state["popularity_weight"])


def find_saved(folder: Path) -> SavedLaser | None:
    """What `write_laser` wrote there, or into the checkpoint of the run there; None if it wrote nothing.

    Raises:
        ValueError: laser.json is damaged or of another format.
    """
    if not (folder / _DESCRIPTION).is_file():
        try:
            folder = whole_directory(folder / _IN_RUN)
        except FileNotFoundError:
            return None
        if not (folder / _DESCRIPTION).is_file():
            return None
    description = _read_json(folder / _DESCRIPTION)
    if description.get("format") != _FORMAT:
        raise ValueError(
            f"find_saved: {_DESCRIPTION} must have format {_FORMAT}, got {description.get('format')!r}; "
            "save the model with this version of laser_fast"
        )
    return SavedLaser(folder, description)


def write_laser(model: "LaserModel", directory: Path, card: str, **facts: Any) -> None:
    """Write the folder; an older one at the same place is replaced when the new one is complete.

    Args:
        card: README.md of the folder.
        facts: anything worth keeping with it (stage, epoch, metrics), as JSON.

    Raises:
        RuntimeError: the model does not know what it was built from, or its item matrix or its calibration belongs to
            older weights.
    """
    origin = origin_of(model)
    model.refuse_outdated()
    recommender = _recommender_of(model)
    own = recommender if is_saved_by_kind(recommender) else None
    tables = _tables_of(model)
    description = {
        "format": _FORMAT,
        "model": origin.config.model_dump(mode="json"),
        "lm": origin.lm.model_dump(mode="json"),
        "base": origin.base,
        "num_items": model.num_items,
        "item_map_hash": item_map_hash(model.item_ids),
        "split_hash": origin.split_hash,
        "recommender": None
        if recommender is None
        else {"kind": type(recommender).__name__, "saved": own is not None, "sha256": weights_hash(recommender)},
        "calibration": None if model.calibration is None else asdict(model.calibration.calibration),
        "tables": {name: {"decay": table.decay, "max_history": table.max_history} for name, table in tables.items()},
        **facts,
    }
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    counts = torch.from_numpy(np.asarray(origin.counts, dtype=np.int64))
    with replace_directory(directory) as fresh:
        save_file(state, fresh / "adapter.safetensors")
        items = {"item_matrix": model.item_matrix.cpu().contiguous(), "counts": counts}
        if model.text is not None:
            items["text_vectors"] = model.text.fetch_vectors().cpu().contiguous()
        save_file(items, fresh / "items.safetensors")
        write_json(fresh / "items.json", {"ids": origin.items.ids, "fields": origin.items.fields})
        if own is not None:
            write_recommender(own, fresh)
        for name, table in tables.items():
            values = {"bounds": table.bounds, "columns": table.columns, "values": table.values}
            save_file(values, fresh / f"{name}.safetensors")
        write_json(fresh / _DESCRIPTION, description)
        (fresh / "README.md").write_text(card, encoding="utf-8")


def origin_of(model: "LaserModel") -> Origin:
    """What a model was built from.

    Raises:
        RuntimeError: it does not know.
    """
    if model.origin is None:
        raise RuntimeError(
            "save_pretrained: the model must know what it was built from, got none; "
            "build it with LaserModel.from_pretrained or set `origin`"
        )
    return model.origin


def _recommender_of(model: "LaserModel") -> object:
    """The one whose states it reads, or whose scores its calibration adds; None."""
    if model.recommender is not None:
        return model.recommender.recommender
    return None if model.calibration is None else model.calibration.components.get("recommender")


def _tables_of(model: "LaserModel") -> dict[str, ItemToItem]:
    """The rules and neighbours whose scores its calibration adds."""
    known = {} if model.calibration is None else model.calibration.components
    found = {}
    for name, kind in _TABLES.items():
        table = known.get(name)
        if isinstance(table, kind):
            found[name] = table
    return found


def weights_hash(recommender: object) -> str | None:
    """SHA-256 of the parameters of a recommender; None for one that is no module."""
    if not isinstance(recommender, nn.Module):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(recommender.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def item_map_hash(item_ids: list[str]) -> str:
    """SHA-256 over the external ids in index order."""
    return ItemTable(item_ids).hash()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint: {path.parent.name} must be whole, got no {path.name}") from error
    except ValueError as error:
        raise ValueError(f"checkpoint: {path.name} must be JSON, got {error}") from error
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        # copies begin where torch's own tensors do, on which sums depend in their last bit; in a file it is anywhere
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint: {path.parent.name} must be whole, got no {path.name}") from error
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path.name} must be a whole safetensors file, got {error}") from error
