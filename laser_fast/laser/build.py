"""The data set, recommender and model of a training run, from its configuration."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from laser_fast.config import EvaluationConfig, LaserConfig, resolve_path
from laser_fast.data import SequenceDataset, Split, make_split
from laser_fast.laser.model import LaserModel
from laser_fast.laser.pretrained import only_model
from laser_fast.lm.loading.language_model import LoadedBase
from laser_fast.lm.loading.language_model import load_language_model as load_language_model
from laser_fast.models.assembly import Foundation
from laser_fast.recommenders.item_to_item import ItemKNN, ItemToItem, SequentialRules
from laser_fast.recommenders.protocol import SequentialRecommender
from laser_fast.recommenders.recommender_files import load_recommender

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Inputs:
    """The files that a configuration names."""

    dataset: SequenceDataset
    split: Split
    recommender: SequentialRecommender | None

    @cached_property
    def rules(self) -> SequentialRules:
        """The sequential rules of the training part, counted at first use."""
        train = self.split.train
        return SequentialRules.fit(train.items, train.cu_seqlens, self.dataset.num_items)

    @cached_property
    def neighbors(self) -> ItemKNN:
        """The item neighbours of the training part, counted at first use."""
        train, limits = self.split.train, {"max_neighbors": 200, "max_history": 20}
        # shrinkage would leave nothing of the rare pairs of a short log
        return ItemKNN.fit(train.items, train.cu_seqlens, self.dataset.num_items, shrinkage=0.0, **limits)

    def tables(self, wanted: EvaluationConfig) -> dict[str, ItemToItem]:
        """The rules and neighbours that a calibrated score may add, by their name in it."""
        if not wanted.calibrate:
            return {}
        found: dict[str, ItemToItem] = {"rules": self.rules} if wanted.sequential_rules else {}
        return found | {"neighbors": self.neighbors} if wanted.neighbors else found


def load_inputs(config: LaserConfig) -> Inputs:
    """Read the data set and the recommender; one that was trained on another split is a ValueError."""
    dataset = SequenceDataset.load(resolve_path(config.data, "data"))
    split = make_split(dataset, **config.split.model_dump())
    recommender = None
    if config.recommender is not None:
        recommender = load_recommender(resolve_path(config.recommender, "recommender"), expected_split_hash=split.hash)
    return Inputs(dataset, split, recommender)


def build_laser(config: LaserConfig, inputs: Inputs, model: "PreTrainedModel", tokenizer: Any) -> LaserModel:
    """`LaserModel.build` around a loaded language model."""
    counts = training_counts(inputs.split, inputs.dataset.num_items)
    foundation = Foundation(
        config=only_model(config),
        base=LoadedBase(model, tokenizer, config.lm),
        items=inputs.dataset.items,
        recommender=inputs.recommender,
        counts=counts,
        known_items=counts > 0,
    )
    return LaserModel.build(foundation, inputs.split.hash)


def training_counts(split: Split, num_items: int) -> np.ndarray:
    """Training events of each item: int64 [I]."""
    counts: np.ndarray = np.bincount(split.train.items, minlength=num_items)
    return counts
