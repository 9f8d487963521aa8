"""The folds of a recommender in one file: the weights that are theirs, and the fold of every user."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from laser_fast.models.cross_fitted import CrossFitted, fold_model
from laser_fast.models.packed_recommender import PackedRecommender

FOLDS_FILE = "recommender_folds.safetensors"
_USERS = "user_folds"
_BASES = "bases"
_ITEMS = "item_embedding."


def write_folds(folds: CrossFitted, folder: Path) -> dict[str, Any]:
    """Write the file; what is to be recorded of it in recommender.json."""
    tensors = {_USERS: torch.from_numpy(np.ascontiguousarray(folds.user_folds, dtype=np.int8))}
    if folds.bases is not None:
        tensors[_BASES] = folds.bases.contiguous().cpu()
    for index, model in enumerate(folds.models):
        tensors |= {f"{index}.{name}": value.contiguous().cpu() for name, value in _own(model, folds.items).items()}
    save_file(tensors, folder / FOLDS_FILE)
    return {"number": len(folds), "items": folds.items, "split_hash": folds.split_hash}


def read_folds(model: PackedRecommender, folder: Path, recorded: dict[str, Any]) -> CrossFitted:
    """What `write_folds` wrote beside `model`; on the CPU, in eval mode.

    Raises:
        ValueError: the file is missing, damaged, of another split than the model, or not of its folds.
    """
    path = folder / FOLDS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"load_recommender: a recommender with folds must have {path.name}, got none") from error
    except SafetensorError as error:
        raise ValueError(f"load_recommender: {path.name} must be a safetensors file, got {error}") from error
    if recorded["split_hash"] != model.split_hash:
        raise ValueError(
            f"load_recommender: the folds must be of the recommender's split, {model.split_hash}, "
            f"got {recorded['split_hash']}"
        )
    number, users = recorded["number"], tensors.pop(_USERS, torch.zeros(0, dtype=torch.int8))
    bases = tensors.pop(_BASES, None)
    if users.dtype != torch.int8 or not users.numel() or int(users.min()) < 0 or int(users.max()) >= number:
        raise ValueError(
            f"load_recommender: {_USERS} of {path.name} must be int8 in 0..{number - 1}, got {users.dtype} "
            f"{users.unique().tolist()[:8]}"
        )
    shape = (number, model.state_size, model.state_size)
    if bases is not None and bases.shape != shape:
        raise ValueError(f"load_recommender: {_BASES} of {path.name} must have shape {shape}, got {tuple(bases.shape)}")
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten at once
        models = [fold_model(model, recorded["items"]) for _ in range(number)]
    expected = {f"{i}.{name}": value for i, fold in enumerate(models) for name, value in fold.state_dict().items()}
    if recorded["items"] == "shared":
        expected = {name: value for name, value in expected.items() if not name.partition(".")[2].startswith(_ITEMS)}
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong += sorted(name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape)
    if wrong:
        raise ValueError(
            f"load_recommender: {path.name} must hold the weights of {number} folds of this {model.kind}, "
            f"got {wrong[0]!r} that is missing, unknown or of another shape"
        )
    for index, fold in enumerate(models):
        own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{index}.")}
        fold.load_state_dict(own, strict=False)  # compared above
        fold.eval()
    return CrossFitted(models, users.numpy(), recorded["items"], recorded["split_hash"], bases)


def _own(model: PackedRecommender, items: str) -> dict[str, Tensor]:
    """The weights of a fold that the full model does not have."""
    state: dict[str, Tensor] = model.state_dict()
    return {name: value for name, value in state.items() if items != "shared" or not name.startswith(_ITEMS)}
