"""The best model of a run: what `save_pretrained` writes, with the configuration of the run and what it reached."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from laser_fast.config import LaserConfig
from laser_fast.files.atomic import whole_directory
from laser_fast.laser.build import Inputs, build_laser, load_inputs, load_language_model, training_counts
from laser_fast.laser.laser_files import SavedLaser, find_saved, write_laser
from laser_fast.laser.model import LaserModel
from laser_fast.laser.model_card import model_card
from laser_fast.lm.loading.language_model import lm_of_saved
from laser_fast.models.token_budget import TokenBudget


class Run(NamedTuple):
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
            data, recommender: where those folders are now, if they moved.
            llm: where the language model is now, see `LanguageModelConfig.path`. Without it nothing is downloaded: a
                model of the hub is taken from the cache.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: a file is damaged, the data are not those of the training, or the language model is not cached.
        """
        saved = find_run(Path(folder))
        config, description = saved.description.config, saved.description
        if config is None:
            raise ValueError(
                f"Run.load: {Path(folder).name} must come from a training run, got a model saved on its own; "
                "load it with LaserModel.from_pretrained"
            )
        lm = lm_of_saved(config.lm, description.base.revision, llm)
        moved: dict[str, Any] = {"data": data or config.data, "recommender": recommender or config.recommender}
        config = config.model_copy(update=moved | {"lm": config.lm if llm is None else lm})
        inputs = load_inputs(config)
        if inputs.split.hash != description.split_hash:
            raise ValueError(
                f"Run.load: {config.data} must be the split of the training, {str(description.split_hash)[:12]}, "
                f"got {inputs.split.hash[:12]}"
            )
        if saved.items().fields != inputs.dataset.items.fields:  # the hash of a split does not cover texts
            raise ValueError(
                "Run.load: the items must have the texts of the training, got other ones in the data set; prepare it "
                "from the same item file"
            )
        saved.refuse_another_recommender(inputs.recommender, "Run.load")
        saved.refuse_other_sizes()
        model = build_laser(config, inputs, *load_language_model(lm)).eval()
        saved.refuse_another_base(model)
        model.encode_within(TokenBudget(config.training.micro_batch_tokens))
        return cls(restore(model, inputs, saved), inputs, config)


def save_laser(
    model: LaserModel, config: LaserConfig, directory: Path, *, validation: dict[str, float], **facts: Any
) -> None:
    """Write the checkpoint folder, with the metrics of the validation rows and other facts that JSON takes."""
    contents = model.contents()
    card = model_card(contents, figures={f"validation {name}": value for name, value in validation.items()})
    write_laser(contents, directory, card, config=config, validation=validation, **facts)


def restore(model: LaserModel, inputs: Inputs, saved: SavedLaser) -> LaserModel:
    """Put the trained state, the item matrix and the calibration of a checkpoint into a model, and return it."""
    saved.put_into(model)
    counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
    model.calibration = saved.calibrated(model, inputs.recommender, counts)
    return model


def find_run(directory: Path) -> SavedLaser:
    """The checkpoint of a run; only its description is read. FileNotFoundError if there is none."""
    if (saved := find_saved(directory)) is None:
        whole_directory(directory)  # it may be missing altogether
        raise FileNotFoundError(
            f"Run.load: a run of `laser-fast train` must hold a model, got none in {str(directory)!r}; if it was "
            "stopped, go on with it (--resume)"
        )
    return saved
