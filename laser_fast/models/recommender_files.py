"""An ID-based recommender in a folder: safetensors and JSON, whole or absent."""

import json
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from laser_fast.data.folders import replace_directory, whole_directory, write_json
from laser_fast.models.cross_fitted import StateGap
from laser_fast.models.cross_fitted_files import read_folds, write_folds
from laser_fast.models.gru4rec import GRU4Rec
from laser_fast.models.packed_recommender import PackedRecommender
from laser_fast.models.published_sasrec import LLaRASASRec, RecBoleSASRec
from laser_fast.models.sasrec import SASRec

_FORMAT = 1
_KINDS: dict[str, type[PackedRecommender]] = {
    model.kind: model for model in (SASRec, GRU4Rec, RecBoleSASRec, LLaRASASRec)
}
_WEIGHTS_FILE = "recommender.safetensors"
_SETTINGS_FILE = "recommender.json"


def is_saved_by_kind(model: object) -> TypeGuard[PackedRecommender]:
    """Whether `write_recommender` can write it and `read_recommender` build it again: it is of a kind known here."""
    return type(model) in _KINDS.values()


def save_recommender(model: PackedRecommender, directory: str | Path, **facts: Any) -> None:
    """Write weights and settings to `directory`, which is replaced as a whole: a reader never sees half of it.

    The models of its folds, where it has some, come along.

    Args:
        facts: anything worth keeping with it, as JSON.
    """
    with replace_directory(Path(directory)) as folder:
        if model.cross_fitted is not None:
            facts["folds"] = write_folds(model.cross_fitted, folder)
        write_recommender(model, folder, **facts)


def write_recommender(model: PackedRecommender, folder: Path, **facts: Any) -> None:
    """The two files of the model itself, without its folds, into a folder that is being written."""
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / _WEIGHTS_FILE)
    settings = {
        "format": _FORMAT,
        "kind": model.kind,
        "model": model.settings,
        "split_hash": model.split_hash,
        "item_map_hash": model.item_map_hash,
        **({} if model.gap is None else {"gap": model.gap.to_dict()}),
        **facts,
    }
    write_json(folder / _SETTINGS_FILE, settings)


def load_recommender(
    directory: str | Path,
    *,
    expected_split_hash: str | None = None,
    expected_item_map_hash: str | None = None,
) -> PackedRecommender:
    """Read what `save_recommender` wrote, or the checkpoint inside a run directory; on the CPU, in eval mode.

    Args:
        directory: the folder of the checkpoint, or the run directory around it.
        expected_split_hash: refuse a model that was fitted on another split.
        expected_item_map_hash: refuse a model of another catalogue.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: another kind of file, foreign or missing weights, or another split or catalogue than expected.
    """
    folder = Path(directory)
    if not (folder / _SETTINGS_FILE).is_file():
        inner = folder / "checkpoint"
        folder = whole_directory(inner if inner.is_dir() else folder)
    if not (folder / _SETTINGS_FILE).is_file():
        raise FileNotFoundError(f"load_recommender: the folder must hold {_SETTINGS_FILE}, got {str(directory)!r}")
    model = read_recommender(folder)
    for what, expected in {"split_hash": expected_split_hash, "item_map_hash": expected_item_map_hash}.items():
        if expected is not None and getattr(model, what) != expected:
            raise ValueError(
                f"load_recommender: {what} must be {expected}, got {getattr(model, what)}; "
                "train the recommender on this very data set, or import it as trained on this split if it was"
            )
    return model


def read_recommender(folder: Path) -> PackedRecommender:
    """Read the files of a folder of `save_recommender`, or the two of `write_recommender`; on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there are none.
        ValueError: another kind of file, foreign or missing weights.
    """
    settings = json.loads((folder / _SETTINGS_FILE).read_text(encoding="utf-8"))
    if settings.get("kind") not in _KINDS or settings.get("format") != _FORMAT:
        raise ValueError(
            f"load_recommender: the checkpoint must be of a kind out of {', '.join(_KINDS)} in format {_FORMAT}, "
            f"got {settings.get('kind')!r} in format {settings.get('format')!r}"
        )
    model = _build(_KINDS[settings["kind"]], settings["model"])
    _load_weights(model, folder / _WEIGHTS_FILE)
    model.split_hash = settings["split_hash"]
    model.item_map_hash = settings["item_map_hash"]
    if settings.get("gap") is not None:
        model.gap = StateGap.from_dict(settings["gap"])
    if settings.get("folds") is not None:
        model.cross_fitted = read_folds(model, folder, settings["folds"])
    return model.eval()


def _build(kind: type[PackedRecommender], settings: dict[str, Any]) -> PackedRecommender:
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten at once
        return kind(**settings)


def _load_weights(model: PackedRecommender, path: Path) -> None:
    """Copy the weights of a file into `model` after comparing names and shapes."""
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"load_recommender: {path.name} must be a safetensors file, got {error}") from error
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"load_recommender: {path.name} must hold the weights of {model.kind}, "
            f"got missing {missing}, unexpected {unexpected}"
        )
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"load_recommender: {name} must have shape {tuple(tensor.shape)}, got {tuple(weights[name].shape)}"
            )
    model.load_state_dict(weights)
