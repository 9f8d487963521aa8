"""An ID-based recommender and its folds in a sealed folder of safetensors and JSON."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import numpy as np
import torch
from pydantic import Field

from laser_fast.config import build_config
from laser_fast.files.atomic import refuse_others, replace_directory, whole_directory, write_json
from laser_fast.files.descriptions import Description, parse_description
from laser_fast.files.sealed import SEAL, SealedFolder, seal
from laser_fast.files.tensors import (
    Shape,
    load_weights_of_file,
    read_tensors,
    refuse_other_shapes,
    tensor_shapes,
    write_tensors,
)
from laser_fast.recommenders.gru4rec import GRU4Rec
from laser_fast.recommenders.packed_recommender import CrossFitted, PackedRecommender
from laser_fast.recommenders.published_sasrec import LLaRASASRec, RecBoleSASRec
from laser_fast.recommenders.sasrec import SASRec
from laser_fast.recommenders.state_spread import StateGap

_FORMAT = 2
_MODELS: tuple[type[PackedRecommender], ...] = (SASRec, GRU4Rec, RecBoleSASRec, LLaRASASRec)
_KINDS = {model.kind: model for model in _MODELS}
_WEIGHTS_FILE = "recommender.safetensors"
_SETTINGS_FILE = "recommender.json"
_FOLDS_FILE = "recommender_folds.safetensors"
_USERS, _BASES = "user_folds", "bases"
_RECORDED = ("split_hash", "item_map_hash", "gap")  # attributes of a model beside its settings
RECOMMENDER_FILES = (_SETTINGS_FILE, _WEIGHTS_FILE, _FOLDS_FILE, SEAL)


class FoldsRecord(Description):
    """What recommender.json says of the folds."""

    number: Annotated[int, Field(ge=1, le=127)]  # the fold of a user is int8
    # with bases; without; without bases and item embeddings, which are the full model's (of older versions alone)
    items: Literal["aligned", "own", "shared"]
    split_hash: str | None


class RecommenderDescription(Description):
    """What recommender.json holds; the model does not depend on `facts`."""

    format: int
    kind: str
    model: dict[str, int | float | str | bool]  # all settings
    split_hash: str | None
    item_map_hash: str | None
    gap: StateGap | None
    folds: FoldsRecord | None
    facts: dict[str, Any]


def is_saved_by_kind(model: object) -> TypeGuard[PackedRecommender]:
    """Whether `write_recommender` can write a model, and `read_recommender` build it again."""
    return type(model) in _MODELS


def save_recommender(model: PackedRecommender, directory: str | Path, **facts: Any) -> None:
    """Write weights, settings and folds to `directory`, which is replaced as a whole.

    Args:
        directory: new, empty, or with a saved recommender alone.
        facts: JSON values to keep with it.

    Raises:
        FileExistsError: the folder holds something else.
    """
    target = Path(directory)
    with replace_directory(target) as folder:
        refuse_others("save_recommender", target, RECOMMENDER_FILES)
        write_recommender(model, folder, with_folds=True, **facts)
        seal(folder)


def write_recommender(model: PackedRecommender, folder: Path, *, with_folds: bool = False, **facts: Any) -> None:
    """Write the files of a model into a folder that is sealed later."""
    write_tensors(model.state_dict(), folder / _WEIGHTS_FILE)
    folds = _write_folds(model.cross_fitted, folder) if with_folds and model.cross_fitted is not None else None
    values = {"format": _FORMAT, "kind": model.kind, "model": model.settings, "folds": folds, "facts": facts}
    values |= {name: getattr(model, name) for name in _RECORDED}
    description = build_config(RecommenderDescription, values, f"write_recommender: {_SETTINGS_FILE}")
    write_json(folder / _SETTINGS_FILE, description.model_dump(mode="json"))


def _write_folds(folds: CrossFitted, folder: Path) -> FoldsRecord:
    tensors = {_USERS: torch.from_numpy(np.ascontiguousarray(folds.user_folds, dtype=np.int8))}
    if folds.bases is not None:
        tensors[_BASES] = folds.bases
    for index, model in enumerate(folds.models):
        tensors |= {f"{index}.{name}": value for name, value in model.state_dict().items()}
    write_tensors(tensors, folder / _FOLDS_FILE)
    items: Literal["aligned", "own"] = "own" if folds.bases is None else "aligned"
    return FoldsRecord(number=len(folds), items=items, split_hash=folds.split_hash)


def load_recommender(
    directory: str | Path, *, expected_split_hash: str | None = None, expected_item_map_hash: str | None = None
) -> PackedRecommender:
    """Read what `save_recommender` wrote, or the checkpoint inside a run directory; on the CPU, in eval mode.

    Args:
        expected_split_hash, expected_item_map_hash: refuse a model of another split or catalogue.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a file is damaged or does not fit, or the model is not the expected one.
    """
    folder = Path(directory)
    if not (folder / _SETTINGS_FILE).is_file():
        inner = folder / "checkpoint"
        folder = whole_directory(inner if inner.is_dir() else folder)
    if not (folder / _SETTINGS_FILE).is_file():
        raise FileNotFoundError(f"load_recommender: the folder must hold {_SETTINGS_FILE}, got {str(directory)!r}")
    _description(folder)  # before the seal: an older format has none
    model = read_recommender(SealedFolder(folder))
    for what, expected in {"split_hash": expected_split_hash, "item_map_hash": expected_item_map_hash}.items():
        if expected is not None and getattr(model, what) != expected:
            raise ValueError(
                f"load_recommender: {what} must be {expected}, got {getattr(model, what)}; "
                "train the recommender on this very data set, or import it as trained on this split if it was"
            )
    return model


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts that `save_recommender` kept with the recommender in a folder."""
    return _description(folder).facts


def read_recommender(sealed: SealedFolder) -> PackedRecommender:
    """Read what `write_recommender` wrote; on the CPU, in eval mode."""
    sealed.file(_SETTINGS_FILE)
    description = _description(sealed.path)
    model = _build(description, sealed)
    load_weights_of_file(model, read_tensors(sealed, _WEIGHTS_FILE), f"load_recommender: {_WEIGHTS_FILE}")
    for name in _RECORDED:
        setattr(model, name, getattr(description, name))
    if description.folds is not None:
        model.cross_fitted = _read_folds(model, sealed, description.folds)
    return model.eval()


def _description(folder: Path) -> RecommenderDescription:
    content, where = (folder / _SETTINGS_FILE).read_bytes(), f"load_recommender: {folder / _SETTINGS_FILE}"
    version, remedy = ("format", _FORMAT), "train it, or import it, again with this version of laser_fast"
    description = parse_description(RecommenderDescription, content, where, version=version, remedy=remedy)
    if description.kind not in _KINDS:
        raise ValueError(f"{where} must be of a kind out of {', '.join(_KINDS)}, got {description.kind!r}")
    return description


def _build(description: RecommenderDescription, sealed: SealedFolder) -> PackedRecommender:
    """The model with random weights, once the file is known to hold weights of these names and shapes."""
    kind, settings, found = _KINDS[description.kind], description.model, tensor_shapes(sealed, _WEIGHTS_FILE)
    where = f"load_recommender: {sealed.path / _SETTINGS_FILE}"
    layers = settings.get("num_layers", 1)
    if not isinstance(layers, int) or layers > len(found):  # even layers without memory take time to build
        raise ValueError(f"{where} must have as many num_layers as {_WEIGHTS_FILE} has weights of, got {layers}")
    try:
        with torch.device("meta"):
            model = kind(**settings)  # type: ignore[arg-type]
    except (TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{where} must hold settings of {description.kind}, got {settings} ({error})") from error
    if missing := sorted(model.settings.keys() - settings.keys()):
        raise ValueError(f"{where} must hold all settings of {description.kind}, got none of {missing}")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _refuse_other_weights(found, wanted, _WEIGHTS_FILE, description.kind)
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
        return model.twin()


def _read_folds(model: PackedRecommender, sealed: SealedFolder, record: FoldsRecord) -> CrossFitted:
    if record.split_hash != model.split_hash:
        raise ValueError(
            f"load_recommender: the folds must be of the recommender's split, {model.split_hash}, "
            f"got {record.split_hash}"
        )
    number, weights = record.number, model.state_dict()
    own = {name: tuple(value.shape) for name, value in weights.items()}
    if record.items == "shared":
        own = {name: shape for name, shape in own.items() if not name.startswith("item_embedding.")}
    wanted: dict[str, Shape] = {f"{index}.{name}": shape for index in range(number) for name, shape in own.items()}
    if record.items == "aligned":
        wanted[_BASES] = (number, model.state_size, model.state_size)
    found = {name: shape for name, shape in tensor_shapes(sealed, _FOLDS_FILE).items() if name != _USERS}
    _refuse_other_weights(found, wanted, _FOLDS_FILE, f"{number} folds of this {model.kind}")
    tensors = read_tensors(sealed, _FOLDS_FILE)
    users, bases = tensors.pop(_USERS, torch.zeros(0, dtype=torch.int8)), tensors.pop(_BASES, None)
    if users.dtype != torch.int8 or not users.numel() or int(users.min()) < 0 or int(users.max()) >= number:
        raise ValueError(
            f"load_recommender: {_USERS} of {_FOLDS_FILE} must be int8 in 0..{number - 1}, got {users.dtype} "
            f"{users.unique().tolist()[:8]}"
        )
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
        models = [model.twin().eval() for _ in range(number)]
    for index, fold in enumerate(models):
        learned = weights | {name: tensors[f"{index}.{name}"] for name in own}
        load_weights_of_file(fold, learned, f"load_recommender: {_FOLDS_FILE}")
    return CrossFitted(models, users.numpy(), record.split_hash, bases)


def _refuse_other_weights(found: dict[str, Shape], wanted: dict[str, Shape], file: str, what: str) -> None:
    """Refuse a file with other tensors before anything of their sizes is built."""
    if wanted.keys() != found.keys():
        raise ValueError(
            f"load_recommender: {file} must hold the weights of {what}, "
            f"got missing {sorted(wanted.keys() - found.keys())}, unexpected {sorted(found.keys() - wanted.keys())}"
        )
    refuse_other_shapes(found, wanted, f"load_recommender: {file}")
