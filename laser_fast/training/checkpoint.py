"""Saving and loading a trained Laser: safetensors and JSON, written beside and renamed; no pickle.

adapter.safetensors   what was trained (`LaserModel.state_dict`)
items.safetensors     the item matrix V that belongs to it
laser.json            configuration, item-map and split hash, calibration, versions
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from laser_fast.config import LaserConfig, build_config
from laser_fast.data.folders import replace_directory, whole_directory, write_json
from laser_fast.data.items import update_with_strings
from laser_fast.models.calibration import CalibratedScorer, Calibration
from laser_fast.models.laser import LaserModel
from laser_fast.models.recommender import Scorer
from laser_fast.models.token_budget import TokenBudget
from laser_fast.training.build import Inputs, build_laser, load_inputs, load_language_model, training_counts

_FORMAT = 1


def save_laser(model: LaserModel, config: LaserConfig, split_hash: str, directory: Path, **facts: Any) -> None:
    """Write the checkpoint folder; an older one at the same place is replaced when the new one is complete.

    Args:
        facts: anything worth keeping with it (stage, epoch, metrics), as JSON.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    description = {
        "format": _FORMAT,
        "config": config.model_dump(mode="json"),
        "split_hash": split_hash,
        "item_map_hash": item_map_hash(model.item_ids),
        "num_items": model.num_items,
        "lm": {"hidden_size": model.lm.hidden_size, "causal": model.lm.causal, "type": type(model.lm.model).__name__},
        "calibration": None if model.calibration is None else asdict(model.calibration.calibration),
        **facts,
    }
    with replace_directory(directory) as fresh:
        save_file(state, fresh / "adapter.safetensors")
        save_file({"item_matrix": model.item_matrix.cpu().contiguous()}, fresh / "items.safetensors")
        write_json(fresh / "laser.json", description)


def load_weights(model: LaserModel, directory: Path) -> dict[str, Any]:
    """Put the trained state and the item matrix of a checkpoint into a model of the same shape; returns its laser.json.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a file of it is damaged, or belongs to another catalogue or another configuration.
    """
    folder = whole_directory(directory)
    description: dict[str, Any] = _read_json(folder / "laser.json")
    if description["item_map_hash"] != item_map_hash(model.item_ids):
        raise ValueError(
            f"load_weights: {folder.name} must belong to this catalogue of {model.num_items} items, "
            f"got another item map, of {description['num_items']} items"
        )
    state = _read_tensors(folder / "adapter.safetensors")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"load_weights: {folder.name} must fit the configuration, got {error}") from error
    model.item_matrix = _read_tensors(folder / "items.safetensors")["item_matrix"].to(model.device)
    return description


def load_laser(
    run: str | Path, *, data: str | None = None, recommender: str | None = None
) -> tuple[LaserModel, Inputs, LaserConfig]:
    """Load the best model of a run, in evaluation mode, with the data and the configuration it was trained on.

    Args:
        run: run directory, or the checkpoint folder in it.
        data, recommender: where those folders are now, if not where the configuration says.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: a damaged file, or data that are not those of the training.
    """
    folder = Path(run)
    folder = whole_directory(folder / "checkpoint") if not (folder / "laser.json").exists() else folder
    description = _read_json(folder / "laser.json")
    values = description["config"]
    values |= {"data": data or values["data"], "recommender": recommender or values["recommender"]}
    config = build_config(LaserConfig, values)
    inputs = load_inputs(config)
    if inputs.split.hash != description["split_hash"]:
        raise ValueError(
            f"load_laser: {config.data} must be the split of the training, {description['split_hash'][:12]}, "
            f"got {inputs.split.hash[:12]}"
        )
    model = build_laser(config, inputs, *load_language_model(config.lm)).eval()
    model.budget = TokenBudget(config.training.micro_batch_tokens)
    return restore(model, inputs, folder), inputs, config


def restore(model: LaserModel, inputs: Inputs, directory: Path) -> LaserModel:
    """`load_weights`, and the calibration that was saved with them; returns the model."""
    saved = load_weights(model, directory)["calibration"]
    model.calibration = None
    if saved is not None:
        settings = Calibration.from_json(json.dumps(saved))
        counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
        model.calibration = CalibratedScorer(calibration_components(model, inputs), settings, counts)
    return model


def calibration_components(model: LaserModel, inputs: Inputs) -> dict[str, Scorer]:
    """The scores that Laser's calibration adds up, by name."""
    scorers: dict[str, Scorer] = {"laser": model}
    if inputs.recommender is not None:
        scorers["recommender"] = inputs.recommender
    return scorers


def fingerprint(inputs: Inputs) -> dict[str, str]:
    """SHA-256 of what a run is trained on, by its name in a message."""
    recommender: object = inputs.recommender
    digest = hashlib.sha256()
    if isinstance(recommender, nn.Module):
        for name, tensor in sorted(recommender.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().numpy().tobytes())
    items = item_map_hash(inputs.dataset.items.ids)
    return {"split": inputs.split.hash, "item map": items, "recommender": digest.hexdigest()}


def item_map_hash(item_ids: Sequence[str]) -> str:
    """SHA-256 over the external ids in index order, the same as `ItemTable.hash`."""
    digest = hashlib.sha256()
    update_with_strings(digest, item_ids)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"checkpoint: {path.name} must be JSON, got {error}") from error
    return values


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        # copies begin where torch's own tensors do, on which sums depend in their last bit; in a file it is anywhere
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path.name} must be a whole safetensors file, got {error}") from error
