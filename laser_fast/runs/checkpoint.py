"""The best model of a run: what `save_pretrained` writes, with the configuration of the run and what it reached."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laser_fast.config import LaserConfig
from laser_fast.files.folders import whole_directory
from laser_fast.laser.build import Inputs, build_laser, load_inputs, load_language_model, training_counts
from laser_fast.laser.laser_files import SavedLaser, find_saved, weights_hash, write_laser
from laser_fast.laser.model import LaserModel
from laser_fast.laser.model_card import model_card
from laser_fast.lm.loading.base_model import lm_of_saved
from laser_fast.models.token_budget import TokenBudget


@dataclass(frozen=True)
class Run:
    """A finished run: its best model in evaluation mode, what it was trained on, and its configuration."""

    model: LaserModel
    inputs: Inputs
    config: LaserConfig

    @classmethod
    def load(
        cls, folder: str | Path, *, data: str | None = None, recommender: str | None = None, llm: str | None = None
    ) -> "Run":
        """Read a run.

        Args:
            folder: run directory, or the checkpoint folder in it.
            data, recommender: where those folders are now, if not where the configuration says.
            llm: where the language model is now, see `LanguageModelConfig.path`. Without it nothing is downloaded: what
                the run names on the hub is taken out of the cache.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: a damaged file, data that are not those of the training, or a language model of the hub that the
                cache does not have.
        """
        saved = find_run(Path(folder))
        config, description = saved.description.config, saved.description
        if config is None:
            raise ValueError(
                f"load_laser: {Path(folder).name} must come from a training run, got a model saved on its own; "
                "load it with LaserModel.from_pretrained"
            )
        lm = lm_of_saved(config.lm, description.base.revision, llm)
        moved: dict[str, Any] = {"data": data or config.data, "recommender": recommender or config.recommender}
        config = config.model_copy(update=moved | {"lm": config.lm if llm is None else lm})
        inputs = load_inputs(config)
        if inputs.split.hash != description.split_hash:
            raise ValueError(
                f"load_laser: {config.data} must be the split of the training, {str(description.split_hash)[:12]}, "
                f"got {inputs.split.hash[:12]}"
            )
        if saved.items().fields != inputs.dataset.items.fields:  # of which a split tells nothing
            raise ValueError(
                "load_laser: the items must have the texts of the training, got other ones in the data set; prepare it "
                "from the same item file"
            )
        saved.refuse_another_recommender(inputs.recommender, "load_laser")
        saved.refuse_other_sizes()
        model = build_laser(config, inputs, *load_language_model(lm)).eval()
        saved.refuse_another_base(model)
        model.budget = TokenBudget(config.training.micro_batch_tokens)
        return cls(restore(model, inputs, saved), inputs, config)


def load_laser(run: str | Path, **moved: str | None) -> tuple[LaserModel, Inputs, LaserConfig]:
    """`Run.load` as a tuple."""
    found = Run.load(run, **moved)
    return found.model, found.inputs, found.config


def save_laser(
    model: LaserModel, config: LaserConfig, directory: Path, *, validation: dict[str, float], **facts: Any
) -> None:
    """Write the checkpoint folder; an older one at the same place is replaced when the new one is complete.

    Args:
        validation: metrics reached on the validation rows, by name.
        facts: anything worth keeping with it (stage, epoch), as JSON.
    """
    contents = model.contents()
    card = model_card(contents, figures={f"validation {name}": value for name, value in validation.items()})
    write_laser(contents, directory, card, config=config, validation=validation, **facts)


def restore(model: LaserModel, inputs: Inputs, saved: SavedLaser) -> LaserModel:
    """Put the trained state, the item matrix and the calibration of a checkpoint into a model, and return it.

    Raises:
        ValueError: a file of it is damaged, or belongs to another catalogue or another configuration.
    """
    saved.put_into(model)
    counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
    model.calibration = saved.calibrated(model, inputs.recommender, counts)
    return model


def fingerprint(inputs: Inputs) -> dict[str, str]:
    """SHA-256 of what a run is trained on, by its name in a message."""
    items = inputs.dataset.items.hash()
    folds = getattr(inputs.recommender, "cross_fitted", None)
    recommenders = [inputs.recommender, *(() if folds is None else folds.models)]
    hashes = " ".join(str(weights_hash(recommender)) for recommender in recommenders)
    return {"split": inputs.split.hash, "item map": items, "recommender": hashes}


def find_run(directory: Path) -> SavedLaser:
    """What a run, or its checkpoint, holds; nothing but the description is read.

    Raises:
        FileNotFoundError: there is no such folder, or no Laser in it.
        ValueError: see `find_saved`.
    """
    saved = find_saved(directory)
    if saved is None:
        whole_directory(directory)  # it may be missing altogether
        raise FileNotFoundError(
            f"load_laser: a run of `laser-fast train` must hold a model, got none in {str(directory)!r}; if it was "
            "stopped, go on with it (--resume)"
        )
    return saved
