"""The folds of a recommender in one file: the weights that are theirs, and the fold of every user."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from laser_fast.files.descriptions import Description
from laser_fast.files.sealed import SealedFolder
from laser_fast.files.tensors import Shape, load_weights_of_file, read_tensors, tensor_shapes, write_tensors
from laser_fast.recommenders.cross_fitted import CrossFitted, FoldItems, fold_model
from laser_fast.recommenders.packed_recommender import PackedRecommender

FOLDS_FILE = "recommender_folds.safetensors"
_USERS = "user_folds"
_BASES = "bases"
_ITEMS = "item_embedding."


class FoldsRecord(Description):
    """What recommender.json says of the folds: how many, and the last two attributes of `CrossFitted`."""

    number: Annotated[int, Field(ge=1, le=127)]  # the fold of a user is int8
    items: FoldItems
    split_hash: str | None


def write_folds(folds: CrossFitted, folder: Path) -> FoldsRecord:
    """Write the file; what is to be recorded of it in recommender.json."""
    tensors = {_USERS: torch.from_numpy(np.ascontiguousarray(folds.user_folds, dtype=np.int8))}
    if folds.bases is not None:
        tensors[_BASES] = folds.bases
    for index, model in enumerate(folds.models):
        tensors |= {f"{index}.{name}": value for name, value in _own(model, folds.items).items()}
    write_tensors(tensors, folder / FOLDS_FILE)
    return FoldsRecord(number=len(folds), items=folds.items, split_hash=folds.split_hash)


def read_folds(model: PackedRecommender, sealed: SealedFolder, recorded: FoldsRecord) -> CrossFitted:
    """What `write_folds` wrote beside `model`; on the CPU, in eval mode.

    Raises:
        ValueError: the file is missing, damaged, of another split than the model, or not of its folds.
    """
    if recorded.split_hash != model.split_hash:
        raise ValueError(
            f"load_recommender: the folds must be of the recommender's split, {model.split_hash}, "
            f"got {recorded.split_hash}"
        )
    number = recorded.number
    _refuse_other_folds(tensor_shapes(sealed, FOLDS_FILE), model, recorded)
    tensors = read_tensors(sealed, FOLDS_FILE)
    users, bases = tensors.pop(_USERS, torch.zeros(0, dtype=torch.int8)), tensors.pop(_BASES, None)
    if users.dtype != torch.int8 or not users.numel() or int(users.min()) < 0 or int(users.max()) >= number:
        raise ValueError(
            f"load_recommender: {_USERS} of {FOLDS_FILE} must be int8 in 0..{number - 1}, got {users.dtype} "
            f"{users.unique().tolist()[:8]}"
        )
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten at once
        models = [fold_model(model, recorded.items) for _ in range(number)]
    for index, fold in enumerate(models):
        own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{index}.")}
        load_weights_of_file(fold, own, f"load_recommender: {FOLDS_FILE}", strict=False)  # names were compared above
        fold.eval()
    return CrossFitted(models, users.numpy(), recorded.items, recorded.split_hash, bases)


def _refuse_other_folds(found: dict[str, Shape], model: PackedRecommender, recorded: FoldsRecord) -> None:
    """Make sure that the file has the weights of these folds in their shapes, and the bases where there are any."""
    bases = (recorded.number, model.state_size, model.state_size)
    expected: dict[str, Shape] = {_BASES: bases} if recorded.items == "aligned" else {}
    if found.get(_BASES) != expected.get(_BASES):
        raise ValueError(
            f"load_recommender: {_BASES} of {FOLDS_FILE} must have shape {expected.get(_BASES)}, "
            f"got {found.get(_BASES)}"
        )
    own = {name: tuple(value.shape) for name, value in _own(model, recorded.items).items()}
    expected |= {f"{index}.{name}": shape for index in range(recorded.number) for name, shape in own.items()}
    weights = {name: shape for name, shape in found.items() if name != _USERS}
    wrong = sorted(expected.keys() ^ weights.keys())
    wrong += sorted(name for name in expected.keys() & weights.keys() if expected[name] != weights[name])
    if wrong:
        raise ValueError(
            f"load_recommender: {FOLDS_FILE} must hold the weights of {recorded.number} folds of this {model.kind}, "
            f"got {wrong[0]!r} that is missing, unknown or of another shape"
        )


def _own(model: PackedRecommender, items: str) -> dict[str, Tensor]:
    """The weights of a fold that the full model does not have."""
    state: dict[str, Tensor] = model.state_dict()
    return {name: value for name, value in state.items() if items != "shared" or not name.startswith(_ITEMS)}
