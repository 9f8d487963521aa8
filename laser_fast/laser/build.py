"""What a training run is built on, from the files its configuration names."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from laser_fast.config import EvaluationConfig, LaserConfig, resolve_path
from laser_fast.data import SequenceDataset, Split, make_split
from laser_fast.laser.laser_files import Origin
from laser_fast.laser.model import LaserModel
from laser_fast.laser.pretrained import Foundation, only_model
from laser_fast.lm.loading.language_model import LoadedBase
from laser_fast.lm.loading.language_model import load_language_model as load_language_model
from laser_fast.recommenders.item_to_item import ItemKNN, ItemToItem, SequentialRules
from laser_fast.recommenders.protocol import SequentialRecommender
from laser_fast.recommenders.recommender_files import load_recommender

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# of the item neighbours that the calibrated score adds: they are saved with it
_MAX_NEIGHBORS = 200
_MAX_HISTORY = 20
_SHRINKAGE = 0.0  # it would leave nothing of the rare pairs that a short log consists of


@dataclass(frozen=True)
class Inputs:
    """What a model is built on, read from the files a configuration names."""

    dataset: SequenceDataset
    split: Split
    recommender: SequentialRecommender | None

    @cached_property
    def rules(self) -> SequentialRules:
        """The sequential rules of the training part, counted when they are first asked for."""
        train = self.split.train
        return SequentialRules.fit(train.items, train.cu_seqlens, self.dataset.num_items)

    @cached_property
    def neighbors(self) -> ItemKNN:
        """The item neighbours of the training part, found when they are first asked for."""
        train = self.split.train
        return ItemKNN.fit(
            train.items,
            train.cu_seqlens,
            self.dataset.num_items,
            max_neighbors=_MAX_NEIGHBORS,
            max_history=_MAX_HISTORY,
            shrinkage=_SHRINKAGE,
        )

    def tables(self, wanted: EvaluationConfig) -> dict[str, ItemToItem]:
        """What was counted in the training part and may be added to a calibrated score, by its name there."""
        if not wanted.calibrate:
            return {}
        found: dict[str, ItemToItem] = {"rules": self.rules} if wanted.sequential_rules else {}
        return found | {"neighbors": self.neighbors} if wanted.neighbors else found


def load_inputs(config: LaserConfig) -> Inputs:
    """Read the data set and the recommender, and make sure that the recommender was trained on this very split.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: the recommender was trained on another split or catalogue.
    """
    dataset = SequenceDataset.load(resolve_path(config.data, "data"))
    split = make_split(dataset, **config.split.model_dump())
    recommender = None
    if config.recommender is not None:
        recommender = load_recommender(resolve_path(config.recommender, "recommender"), expected_split_hash=split.hash)
    return Inputs(dataset, split, recommender)


def build_laser(config: LaserConfig, inputs: Inputs, model: "PreTrainedModel", tokenizer: Any) -> LaserModel:
    """Assemble a new `LaserModel`; its trained parameters are initialised from torch's global generator."""
    items, counts = inputs.dataset.items, training_counts(inputs.split, inputs.dataset.num_items)
    origin = Origin(only_model(config), config.lm, {}, items, counts, inputs.split.hash)
    base = LoadedBase(model, tokenizer, config.lm)
    return LaserModel.build(Foundation(origin, base, inputs.recommender, counts > 0))


def training_counts(split: Split, num_items: int) -> np.ndarray:
    """How often each item occurs in the training part: int64 [I]."""
    counts: np.ndarray = np.bincount(split.train.items, minlength=num_items)
    return counts
