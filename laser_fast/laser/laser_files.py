"""A trained Laser in a folder: safetensors and JSON, whole or absent; nothing of the frozen language model.

laser.json               settings, the language model it belongs to, hashes, calibration
adapter.safetensors      the trained parameters (`LaserModel.state_dict`)
items.safetensors        the item matrix V, training events of each item, text vectors of a residual
items.json               the catalogue: external ids and text fields in index order
recommender.*            the frozen recommender, if one is read
rules.safetensors        sequential rules of the calibrated score, if any
neighbors.safetensors    its item neighbours, if any
seal.json                size and SHA-256 of every file above; none is read without it
README.md                a model card, which may be edited
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub import ModelCard
from torch import nn

from laser_fast.config import LanguageModelConfig, LaserConfig, ModelConfig, build_config
from laser_fast.data.items import ItemTable
from laser_fast.files.atomic import replace_directory, whole_directory, write_json
from laser_fast.files.descriptions import Description, parse_description
from laser_fast.files.sealed import SEAL, SealedFolder, seal
from laser_fast.files.tensors import (
    load_weights_of_file,
    read_tensors,
    refuse_other_shapes,
    tensor_shapes,
    write_tensors,
)
from laser_fast.laser.description import LaserDescription
from laser_fast.laser.encoder import LaserEncoder
from laser_fast.lm.loading.base_model import differences
from laser_fast.recommenders.item_to_item import ItemKNN, ItemToItem, SequentialRules, refuse_other_table
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.protocol import Scorer
from laser_fast.recommenders.recommender_files import (
    RECOMMENDER_FILES,
    is_saved_by_kind,
    read_recommender,
    write_recommender,
)
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration, calibration_components

_FORMAT = 3
_DESCRIPTION = "laser.json"
_ADAPTER = "adapter.safetensors"
_ITEM_TENSORS = "items.safetensors"
_ITEMS = "items.json"
_TABLES: dict[str, type[ItemToItem]] = {"rules": SequentialRules, "neighbors": ItemKNN}
_TABLE_PARTS = ("bounds", "columns", "values")
_DERIVED = ("item_matrix", "text_vectors")
_IN_RUN = "checkpoint"
LASER_FILES: tuple[str, ...] = (_DESCRIPTION, _ADAPTER, _ITEM_TENSORS, _ITEMS, SEAL, "README.md", *RECOMMENDER_FILES)
LASER_FILES += tuple(f"{name}.safetensors" for name in _TABLES)


@dataclass(frozen=True, eq=False)
class Origin:
    """What a model was built from; recorded when it is saved and compared when it is loaded."""

    config: ModelConfig
    lm: LanguageModelConfig  # where the language model was loaded from, and how
    base: dict[str, Any]  # what it is, see `describe_base`
    items: ItemTable
    counts: np.ndarray  # int64 [I], training events of each item; 0 if unknown
    split_hash: str | None = None  # of the training split; None if unknown


class Built(Protocol):
    """A model that may know its origin."""

    origin: Origin | None


def origin_of(model: Built) -> Origin:
    """The origin of a model; a RuntimeError if it has none."""
    if model.origin is None:
        raise RuntimeError(
            "save_pretrained: the model must know what it was built from, got none; "
            "build it with LaserModel.from_pretrained or set `origin`"
        )
    return model.origin


@dataclass(frozen=True, eq=False)
class LaserContents:
    """The savable parts of a model, of one version of its weights."""

    encoder: LaserEncoder
    origin: Origin
    calibration: CalibratedScorer | None

    @property
    def recommender(self) -> object:
        """The one that the model reads, else the one in its calibration, if any."""
        if self.encoder.recommender is not None:
            return self.encoder.recommender.recommender
        return None if self.calibration is None else self.calibration.components.get("recommender")

    @property
    def tables(self) -> dict[str, ItemToItem]:
        """The rules and neighbours in the calibration."""
        components = {} if self.calibration is None else self.calibration.components
        parts = {name: components.get(name) for name in _TABLES}
        return {name: part for name, part in parts.items() if isinstance(part, _TABLES[name])}


class _Items(Description):
    ids: list[str]
    fields: dict[str, list[str]]


@dataclass(frozen=True, eq=False)
class SavedLaser:
    """A folder written by `write_laser`, whose files are compared with the seal when they are read.

    Methods raise ValueError for a damaged file, or for one that belongs to something else.
    """

    sealed: SealedFolder
    description: LaserDescription

    def items(self) -> ItemTable:
        """The catalogue."""
        values = parse_description(_Items, self.sealed.read(_ITEMS), f"checkpoint: {_ITEMS}")
        table, expected = ItemTable(values.ids, values.fields), self.description
        if len(table) != expected.num_items or table.hash() != expected.item_map_hash:
            raise ValueError(
                f"checkpoint: {_ITEMS} must hold the {expected.num_items} items of {_DESCRIPTION}, "
                f"{expected.item_map_hash[:12]}, got {len(table)}, {table.hash()[:12]}"
            )
        return table

    def counts(self) -> np.ndarray:
        """Training events of each item: int64 [I]."""
        counts: np.ndarray = read_tensors(self.sealed, _ITEM_TENSORS, ["counts"])["counts"].numpy()
        if counts.dtype != np.int64 or (counts < 0).any():
            raise ValueError(f"checkpoint: counts of {_ITEM_TENSORS} must be int64 and not negative, got {counts}")
        return counts

    def recommender(self) -> PackedRecommender | None:
        """The recommender in the folder, if any."""
        record = self.description.recommender
        return read_recommender(self.sealed) if record is not None and record.saved else None

    def tables(self) -> dict[str, ItemToItem]:
        """The rules and neighbours of the calibration, by name."""
        found: dict[str, ItemToItem] = {}
        for name, settings in self.description.tables.items():
            values = read_tensors(self.sealed, f"{name}.safetensors")
            refuse_other_table(values, self.description.num_items, f"{name}.safetensors")
            found[name] = _TABLES[name](*(values[part] for part in _TABLE_PARTS), **settings.model_dump())
        return found

    def refuse_other_sizes(self) -> None:
        """Refuse tensors of other sizes than the description says, before anything of these sizes is built."""
        found = tensor_shapes(self.sealed, _ITEM_TENSORS)
        empty = found.get("item_matrix", (1,))[0] == 0  # saved before `refresh_items`
        wanted = self.description.item_shapes(0 if empty else self.description.num_items)
        refuse_other_shapes(found, wanted, f"checkpoint: {_ITEM_TENSORS}")
        found, wanted = tensor_shapes(self.sealed, _ADAPTER), self.description.adapter_shapes()
        refuse_other_shapes(found, wanted, f"checkpoint: {_ADAPTER}")

    def refuse_another_base(self, model: Built) -> None:
        """Refuse a model around another language model or tokenizer than that of the training."""
        expected = self.description.base
        if found := differences(expected.model_dump(), origin_of(model).base):
            raise ValueError(
                f"from_pretrained: the language model must be the {expected.type} this Laser was trained with, got "
                + ", ".join(found)
            )

    def refuse_another_recommender(self, recommender: object, function: str) -> None:
        """Refuse another recommender than that of the training, if there was one."""
        expected = self.description.recommender
        if expected is not None and expected.sha256 != (found := weights_hash(recommender)):
            raise ValueError(
                f"{function}: recommender must be the {expected.kind} of the training, {str(expected.sha256)[:12]}, "
                f"got a {type(recommender).__name__}, {str(found)[:12]}"
            )

    def calibrated(self, laser: Scorer, recommender: Scorer | None, counts: torch.Tensor) -> CalibratedScorer | None:
        """The saved calibrated score, if any; counts: int64 [I], as `Origin.counts`."""
        if self.description.calibration is None:
            return None
        settings = Calibration(**self.description.calibration.model_dump())
        known = calibration_components(laser, recommender, self.tables())
        components = {name: scorer for name, scorer in known.items() if name in settings.weights}
        return CalibratedScorer(components, settings, counts)

    def put_into(self, model: LaserEncoder) -> None:
        """Put trained parameters and item matrix into a model of the same catalogue and shape."""
        name = self.sealed.path.name
        if self.description.item_map_hash != ItemTable(model.item_ids).hash():
            raise ValueError(
                f"load_weights: {name} must belong to this catalogue of {model.num_items} items, "
                f"got another item map, of {self.description.num_items} items"
            )
        # all is read before anything is changed
        state, items = read_tensors(self.sealed, _ADAPTER), read_tensors(self.sealed, _ITEM_TENSORS, _DERIVED)
        if wrong := {name: value.dtype for name, value in items.items() if not value.is_floating_point()}:
            raise ValueError(f"load_weights: {_ITEM_TENSORS} must hold {', '.join(_DERIVED)} in float32, got {wrong}")
        try:
            load_weights_of_file(model, state, f"load_weights: {_ADAPTER}")
        except RuntimeError as error:
            raise ValueError(f"load_weights: {name} must fit the configuration, got {error}") from error
        if model.text is not None and "text_vectors" in items:
            model.text.set_vectors(items["text_vectors"])
        # last, because it belongs to all before it
        model.item_matrix = items["item_matrix"].to(model.device, torch.float32)

    def put_text_into(self, model: LaserEncoder) -> None:
        """Put the text residual alone into a model of the same text settings, and the weight of popularity."""
        assert model.text is not None
        vectors = read_tensors(self.sealed, _ITEM_TENSORS, ["text_vectors"])["text_vectors"]
        state = read_tensors(self.sealed, _ADAPTER)
        own = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
        load_weights_of_file(model.text, own, f"put_text_into: {_ADAPTER}")
        model.text.set_vectors(vectors)
        if model.popularity_weight is not None and "popularity_weight" in state:
            with torch.no_grad():
                model.popularity_weight.copy_(state["popularity_weight"])


def find_saved(folder: Path) -> SavedLaser | None:
    """The saved Laser in a folder or in the checkpoint of a run; None if there is none.

    Raises:
        ValueError: laser.json is damaged or of another format, or a file of the folder is missing or of another size.
    """
    if not (folder / _DESCRIPTION).is_file():
        try:
            folder = whole_directory(folder / _IN_RUN)
        except FileNotFoundError:
            return None
        if not (folder / _DESCRIPTION).is_file():
            return None
    where, remedy = f"find_saved: {folder / _DESCRIPTION}", "save the model with this version of laser_fast"
    content, version = (folder / _DESCRIPTION).read_bytes(), ("format", _FORMAT)
    description = parse_description(LaserDescription, content, where, version=version, remedy=remedy)
    sealed = SealedFolder(folder)  # after the description, because older formats have no seal
    sealed.file(_DESCRIPTION)
    return SavedLaser(sealed, description)


def write_laser(
    contents: LaserContents, directory: Path, card: ModelCard, *, config: LaserConfig | None = None, **facts: Any
) -> None:
    """Write the folder; an older one at its place is replaced when the new one is complete.

    Args:
        card: README.md.
        config: of the run that writes it.
        facts: anything worth keeping with it (stage, epoch, metrics), as JSON.

    Raises:
        ValueError: it could not be read again, such as a calibration that is not finite.
    """
    model, origin = contents.encoder, contents.origin
    description = _describe(contents, config, facts)
    with replace_directory(directory) as fresh:
        write_tensors(model.state_dict(), fresh / _ADAPTER)
        counts = torch.from_numpy(np.asarray(origin.counts, dtype=np.int64))
        items = {"item_matrix": model.item_matrix, "counts": counts}
        if model.text is not None:
            items["text_vectors"] = model.text.fetch_vectors()
        write_tensors(items, fresh / _ITEM_TENSORS)
        write_json(fresh / _ITEMS, {"ids": origin.items.ids, "fields": origin.items.fields})
        if is_saved_by_kind(contents.recommender):
            write_recommender(contents.recommender, fresh)
        for name, table in contents.tables.items():
            write_tensors({part: getattr(table, part) for part in _TABLE_PARTS}, fresh / f"{name}.safetensors")
        write_json(fresh / _DESCRIPTION, description.model_dump(mode="json"))
        (fresh / "README.md").write_text(str(card), encoding="utf-8")
        seal(fresh)


def _describe(contents: LaserContents, config: LaserConfig | None, facts: dict[str, Any]) -> LaserDescription:
    origin, recommender, calibration = contents.origin, contents.recommender, contents.calibration
    record = None
    if recommender is not None:
        saved = is_saved_by_kind(recommender)
        record = {"kind": type(recommender).__name__, "saved": saved, "sha256": weights_hash(recommender)}
    tables = contents.tables.items()
    values = {
        "format": _FORMAT,
        "model": origin.config,
        "lm": origin.lm,
        "base": origin.base,
        "num_items": contents.encoder.num_items,
        "item_map_hash": ItemTable(contents.encoder.item_ids).hash(),
        "split_hash": origin.split_hash,
        "recommender": record,
        "calibration": None if calibration is None else asdict(calibration.calibration),
        "tables": {name: {"decay": table.decay, "max_history": table.max_history} for name, table in tables},
        "config": config,
        "facts": facts,
    }
    return build_config(LaserDescription, values, f"write_laser: {_DESCRIPTION}")


def weights_hash(recommender: object) -> str | None:
    """SHA-256 of the parameters of a recommender; None if it is no module."""
    if not isinstance(recommender, nn.Module):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(recommender.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
