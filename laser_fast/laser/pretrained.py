"""From the arguments of `LaserModel.from_pretrained` to the parts that a model is built on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from laser_fast.config import LanguageModelConfig, LaserConfig, ModelConfig, build_config, resolve_path
from laser_fast.config.yaml_text import read_yaml
from laser_fast.data.items import ItemTable
from laser_fast.data.tokens import Tokenizer
from laser_fast.laser.laser_files import SavedLaser, find_saved
from laser_fast.lm.loading.hub import find_folder
from laser_fast.lm.loading.language_model import RANDOM_SCHEME, lm_of_saved, load_base
from laser_fast.models.assembly import Foundation
from laser_fast.recommenders.protocol import SequentialRecommender
from laser_fast.recommenders.recommender_files import load_recommender

Items = ItemTable | Mapping[str, str] | Mapping[str, Mapping[str, str]]
Recommender = SequentialRecommender | str | Path


@dataclass(frozen=True, eq=False, kw_only=True)
class Sources:
    """The arguments of `LaserModel.from_pretrained` that name models."""

    pretrained: str | Path | nn.Module
    llm: str | Path | nn.Module | None
    tokenizer: Tokenizer | str | None
    recommender: Recommender | None
    precision: dict[str, str]  # `dtype` and `quantization`, where they are given
    revision: str | None
    local_files_only: bool

    def find_saved(self) -> SavedLaser | None:
        """The saved Laser that `pretrained` names; None if it is a language model."""
        if isinstance(self.pretrained, nn.Module) or isinstance(self.llm, nn.Module):
            refuse_given("a loaded language model, which stays as it is", **self.precision)
        if isinstance(self.pretrained, nn.Module) or str(self.pretrained).startswith(RANDOM_SCHEME):
            return None
        return find_saved(find_folder(str(self.pretrained), self.revision, self.local_files_only))

    def of_new(
        self,
        items: Items | None,
        config: ModelConfig | Mapping[str, Any] | str | Path | None,
        item_counts: Sequence[int] | np.ndarray | None,
    ) -> Foundation:
        """The foundation of a new Laser."""
        refuse_given("a new Laser", llm=self.llm)
        if items is None:
            raise ValueError(
                "from_pretrained: items must be given (id -> text) unless pretrained is a saved Laser, got None "
                f"and no laser.json in {_name_of(self.pretrained)!r}"
            )
        settings = build_config(LanguageModelConfig, {"path": "", **self.precision})
        base = load_base(self.pretrained, self.tokenizer, settings, self.revision, self.local_files_only)
        table = items if isinstance(items, ItemTable) else _item_table(items)
        counts = _counts(item_counts, len(table))
        known = np.ones(len(table), dtype=bool) if item_counts is None else counts > 0
        return Foundation(_model_config(config), base, table, self._recommender(table), counts, known)

    def of_saved(self, saved: SavedLaser) -> Foundation:
        """The foundation of a saved Laser."""
        description, items = saved.description, saved.items()
        saved.refuse_other_sizes()
        settings = build_config(LanguageModelConfig, {**description.lm.model_dump(), **self.precision})
        if self.llm is None and not settings.path:
            raise ValueError(
                f"from_pretrained: llm must be given for this Laser, whose {description.base.type} came from no "
                "folder, got None"
            )
        named = lm_of_saved(settings, description.base.revision, self.llm, self.tokenizer)
        source = named.path if self.llm is None else self.llm
        base = load_base(source, self.tokenizer or named.tokenizer, settings, None, self.local_files_only)
        kept = self.tokenizer or settings.tokenizer  # recorded by name, not by the place in the cache
        where = {"tokenizer": kept} if isinstance(kept, str) else {}
        where |= {"path": settings.path} if self.llm is None else {}
        base = replace(base, settings=base.settings.model_copy(update=where))
        recommender = self._recommender(items)
        if (expected := description.recommender) is not None:
            recommender = saved.recommender() if recommender is None else recommender
            if recommender is None:
                raise ValueError(
                    f"from_pretrained: recommender must be given for this Laser, which reads a {expected.kind} that is "
                    "not in its folder, got None"
                )
            saved.refuse_another_recommender(recommender, "from_pretrained")
        counts = saved.counts()
        known = counts > 0 if counts.any() else np.ones(len(items), dtype=bool)
        return Foundation(description.model, base, items, recommender, counts, known)

    def _recommender(self, items: ItemTable) -> SequentialRecommender | None:
        recommender = self.recommender
        if isinstance(recommender, str | Path):
            recommender = load_recommender(resolve_path(recommender, "recommender"))
        known = getattr(recommender, "item_map_hash", None)
        if known is not None and known != items.hash():
            raise ValueError(
                "from_pretrained: recommender must know the items of this catalogue in this order, "
                f"{items.hash()[:12]}, got {known[:12]}"
            )
        return recommender


def only_model(config: ModelConfig) -> ModelConfig:
    """The settings of the model among those of a run."""
    return ModelConfig(**{name: getattr(config, name) for name in ModelConfig.model_fields})


def refuse_given(what: str, **arguments: Any) -> None:
    """Refuse arguments of `from_pretrained` that `what` has no use for, unless they are None."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"from_pretrained: {name} must be left out for {what}, got {_name_of(value)}")


def _model_config(config: ModelConfig | Mapping[str, Any] | str | Path | None) -> ModelConfig:
    where = "configuration"
    if isinstance(config, str | Path):
        where, config = str(config), read_yaml(resolve_path(config))
        others = LaserConfig.model_fields.keys() - ModelConfig.model_fields.keys()  # of a training run
        config = {name: value for name, value in config.items() if name not in others}
    return only_model(config) if isinstance(config, ModelConfig) else build_config(ModelConfig, config or {}, where)


def _item_table(items: Mapping[str, Any]) -> ItemTable:
    if not isinstance(items, Mapping):
        raise TypeError(f"from_pretrained: items must map ids to texts, got a {type(items).__name__}")
    rows = [value if isinstance(value, Mapping) else {"title": value} for value in items.values()]
    names = sorted({name for row in rows for name in row})
    return ItemTable(list(items), {name: [row.get(name, "") for row in rows] for name in names})


def _counts(counts: Sequence[int] | np.ndarray | None, num_items: int) -> np.ndarray:
    values = np.zeros(num_items, dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    if values.shape != (num_items,) or (values < 0).any():
        raise ValueError(
            f"from_pretrained: item_counts must be {num_items} counts, one for each item, got shape {values.shape}"
            + (f" and {values.min()}" if values.size else "")
        )
    return values


def _name_of(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else f"a {type(value).__name__}"
