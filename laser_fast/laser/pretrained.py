"""`from_pretrained`, `save_pretrained` and `push_to_hub` of a model, as users of Hugging Face know them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import nn

from laser_fast.config import LanguageModelConfig, LaserConfig, ModelConfig, build_config, resolve_path
from laser_fast.config.yaml_text import read_yaml
from laser_fast.data.items import ItemTable
from laser_fast.data.tokens import Tokenizer
from laser_fast.files.claims import claim
from laser_fast.files.folders import refuse_others
from laser_fast.laser.catalogue_texts import read_texts
from laser_fast.laser.laser_files import LASER_FILES, Origin, SavedLaser, find_saved, write_laser
from laser_fast.laser.model_card import model_card
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.base_model import describe_base
from laser_fast.lm.loading.hub import find_folder
from laser_fast.lm.loading.language_model import RANDOM_SCHEME, LoadedBase, lm_of_saved, load_base
from laser_fast.models.assembly import build_execution, build_model_batches, check_tokens, laser_parts
from laser_fast.recommenders.item_to_item import ItemToItem
from laser_fast.recommenders.protocol import Scorer, SequentialRecommender
from laser_fast.recommenders.recommender_files import load_recommender
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration

if TYPE_CHECKING:
    from typing_extensions import Self

    from laser_fast.laser.model import LaserModel

Items = ItemTable | Mapping[str, str] | Mapping[str, Mapping[str, str]]
Recommender = SequentialRecommender | str | Path


class PretrainedLaser(ModelHubMixin):
    """Saving and loading of `LaserModel`.

    Attributes:
        origin: what the model was built from; None for one that was put together by hand.
    """

    # not None: the mixin would record the constructor's arguments otherwise
    _hub_mixin_config: dict[str, Any] | None = {}  # noqa: RUF012
    origin: Origin | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained: str | Path | nn.Module,
        *,
        items: Items | None = None,
        recommender: Recommender | None = None,
        config: ModelConfig | Mapping[str, Any] | str | Path | None = None,
        llm: str | Path | nn.Module | None = None,
        tokenizer: Tokenizer | str | None = None,
        item_counts: Sequence[int] | np.ndarray | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "Self":
        """A new Laser around a language model, or one that was saved.

            model = LaserModel.from_pretrained("Qwen/Qwen3-0.6B", items={"B00A": "Instax film"}, recommender=sasrec)
            model.save_pretrained("my-laser")
            model = LaserModel.from_pretrained("my-laser")

        A folder that was written by `save_pretrained`, or that holds a training run, gives the model in it: in
        evaluation mode, with its item matrix and calibration. Anything else is a language model, around which a new
        Laser is built (initialised from torch's global generator, without an item matrix until `refresh_items`).

        Args:
            pretrained: folder, `package:NAME/FOLDER`, `hub:OWNER/NAME` (or OWNER/NAME where there is no such folder),
                `random:SHAPE`, or a loaded Hugging Face model, with a head or without.
            items: the catalogue of a new Laser: id -> text (the field "title") or text fields, or an `ItemTable`.
            recommender: whose states M-Former reads: a `SequentialRecommender` or a folder with a trained one. A
                saved Laser brings one of ours along.
            config: settings of a new Laser: `ModelConfig`, a mapping, or a YAML file.
            llm: where the language model of a saved Laser is now; None = where it was. What a saved Laser itself names
                on the hub is taken out of the cache and never fetched: pass llm="hub:OWNER/NAME" to have it fetched.
            tokenizer: of a loaded language model, or a folder, or `hub:OWNER/NAME`.
            item_counts: [I], training events of every item of a new Laser; the recommender's states of items with
                none are not read. None = all are known.
            dtype, quantization: of the frozen weights, see `LanguageModelConfig`; None = those a saved Laser was
                trained with, else "auto" and "none". Not for a loaded model.
            revision: of a hub repository: branch, tag or commit.
            local_files_only: ask the hub for nothing, whatever is named here.

        Raises:
            FileNotFoundError: a folder, package or repository does not exist.
            TypeError: items that are no mapping.
            ValueError: no catalogue, another one than the recommender's, or settings that do not fit; of a saved
                Laser a damaged file, another recommender, another language model (lists the differences), or one that
                it names on the hub and the cache does not have.
        """
        precision = {"dtype": dtype, "quantization": quantization}
        given = {name: value for name, value in precision.items() if value is not None}
        if isinstance(pretrained, nn.Module) or isinstance(llm, nn.Module):
            _refuse("a loaded language model, which stays as it is", **precision)
        if not isinstance(pretrained, nn.Module) and not str(pretrained).startswith(RANDOM_SCHEME):
            saved = find_saved(find_folder(str(pretrained), revision, local_files_only))
            if saved is not None:
                _refuse("a saved Laser", items=items, config=config, item_counts=item_counts)
                chosen = build_config(LanguageModelConfig, {**saved.description.lm.model_dump(), **given})
                return cls._restored(saved, chosen, llm, tokenizer, recommender, local_files_only)
        _refuse("a new Laser", llm=llm)
        if items is None:
            raise ValueError(
                "from_pretrained: items must be given (id -> text) unless pretrained is a saved Laser, got None "
                f"and no laser.json in {_name_of(pretrained)!r}"
            )
        settings = build_config(LanguageModelConfig, {"path": "", **given})
        base = load_base(pretrained, tokenizer, settings, revision, local_files_only)
        table = items if isinstance(items, ItemTable) else _item_table(items)
        counts = _counts(item_counts, len(table))
        known = np.ones(len(table), dtype=bool) if item_counts is None else counts > 0
        model_config = _model_config(config)
        read = _recommender(recommender, table)
        split_hash = None if read is None else read.split_hash
        origin = Origin(model_config, base.settings, {}, table, counts, split_hash)
        return cls._built(origin, base, read, known)

    @classmethod
    def _built(
        cls, origin: Origin, base: LoadedBase, recommender: SequentialRecommender | None, known_items: np.ndarray
    ) -> "Self":
        """A model with random trained parameters; `origin.base` is filled in."""
        config = origin.config
        lm = FrozenLM(base.model, build_execution(config.execution))
        origin.base.update(describe_base(lm, base.tokenizer))
        builder = build_model_batches(config, origin.items, base.tokenizer, known_items)
        check_tokens(builder, lm)
        model = cls(**laser_parts(config, lm, builder, origin.items.ids, recommender, origin.counts))
        read_texts(cast("LaserModel", model), config, origin.items, base.tokenizer)
        model.origin = origin
        return model

    @classmethod
    def _restored(
        cls,
        saved: SavedLaser,
        settings: LanguageModelConfig,
        llm: str | Path | nn.Module | None,
        tokenizer: Tokenizer | str | None,
        recommender: Recommender | None,
        local_files_only: bool,
    ) -> "Self":
        """The model of a folder, on the language model it was trained with."""
        expected, items = saved.description.base, saved.items()
        saved.refuse_other_sizes()
        if llm is None and not settings.path:
            raise ValueError(
                f"from_pretrained: llm must be given for this Laser, whose {expected.type} came from no folder, "
                "got None"
            )
        named = lm_of_saved(settings, expected.revision, llm, tokenizer)
        base = load_base(
            named.path if llm is None else llm, tokenizer or named.tokenizer, settings, None, local_files_only
        )
        kept = tokenizer or settings.tokenizer  # as it was named, not where the cache has it
        where = {"tokenizer": kept} if isinstance(kept, str) else {}
        where |= {"path": settings.path} if llm is None else {}
        base = replace(base, settings=base.settings.model_copy(update=where))
        read = _saved_recommender(saved, recommender, items)
        counts = saved.counts()
        known = counts > 0 if counts.any() else np.ones(len(items), dtype=bool)
        origin = Origin(saved.description.model, base.settings, {}, items, counts, saved.description.split_hash)
        with torch.random.fork_rng(devices=[]):  # the random parameters are overwritten at once
            model = cls._built(origin, base, read, known)
        laser = cast("LaserModel", model)
        saved.refuse_another_base(laser)
        saved.put_into(laser)
        restore_calibration(laser, saved, torch.from_numpy(counts), read)
        return cast("Self", laser.eval())

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        config: Any = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_arguments: Any,
    ) -> str | None:
        """Write what was trained, and nothing of the language model; whole or not at all.

        Args:
            save_directory: a new or empty folder, or one with a saved Laser alone, which is replaced.
            repo_id: its name on the hub; with `push_to_hub` the name of the folder if None.
            push_to_hub: upload it as well; `push_arguments` go to `push_to_hub`.
            config: not used; the settings are the model's.
            model_card_kwargs: `figures`: metrics to print in the model card, by name.

        Returns:
            The URL of the commit when it was uploaded.

        Raises:
            FileExistsError: the folder holds something else.
            ValueError: another process writes it.
            RuntimeError: the model was put together by hand and does not know its origin, or its item matrix or its
                calibration belongs to older weights.
        """
        folder = Path(save_directory).resolve()  # a link to a folder elsewhere stays one
        laser = cast("LaserModel", self)
        with claim(folder):
            refuse_others("save_pretrained", folder, LASER_FILES)
            write_laser(laser, folder, model_card(laser, repo_id=repo_id, **(model_card_kwargs or {})))
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or Path(save_directory).name, model_card_kwargs=model_card_kwargs, **push_arguments
        )

    def generate_model_card(self, *_: Any, **figures: Any) -> ModelCard:
        """The model card that is saved with the model."""
        return ModelCard(model_card(cast("LaserModel", self), **figures))


def restore_calibration(
    model: "LaserModel", saved: SavedLaser, counts: torch.Tensor, recommender: SequentialRecommender | None
) -> None:
    """Give a model the calibrated score that was saved with it, if one was.

    Args:
        counts: int64 [I], events of each item in the training part.
    """
    model.calibration = None
    values = saved.description.calibration
    if values is not None:
        settings = Calibration(**values.model_dump())
        known = calibration_components(model, recommender, saved.tables())
        components = {name: scorer for name, scorer in known.items() if name in settings.weights}
        model.calibration = CalibratedScorer(components, settings, counts)


def calibration_components(
    model: "LaserModel", recommender: SequentialRecommender | None, tables: Mapping[str, ItemToItem]
) -> dict[str, Scorer]:
    """The scores that Laser's calibration adds up, by name."""
    return {"laser": model} | ({} if recommender is None else {"recommender": recommender}) | dict(tables)


def _model_config(config: ModelConfig | Mapping[str, Any] | str | Path | None) -> ModelConfig:
    where = "configuration"
    if isinstance(config, str | Path):
        where, config = str(config), read_yaml(resolve_path(config))
        # the file of a training run says more than what the model is
        others = LaserConfig.model_fields.keys() - ModelConfig.model_fields.keys()
        config = {name: value for name, value in config.items() if name not in others}
    return only_model(config) if isinstance(config, ModelConfig) else build_config(ModelConfig, config or {}, where)


def only_model(config: ModelConfig) -> ModelConfig:
    """Of the settings of a run those of the model."""
    return ModelConfig(**{name: getattr(config, name) for name in ModelConfig.model_fields})


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


def _recommender(recommender: Recommender | None, items: ItemTable) -> SequentialRecommender | None:
    if isinstance(recommender, str | Path):
        recommender = load_recommender(resolve_path(recommender, "recommender"))
    known = getattr(recommender, "item_map_hash", None)
    if known is not None and known != items.hash():
        raise ValueError(
            f"from_pretrained: recommender must know the items of this catalogue in this order, {items.hash()[:12]}, "
            f"got {known[:12]}"
        )
    return recommender


def _saved_recommender(saved: SavedLaser, given: Recommender | None, items: ItemTable) -> SequentialRecommender | None:
    """The recommender a saved model needs: the one in its folder, or the same one from elsewhere."""
    expected = saved.description.recommender
    recommender = _recommender(given, items)
    if expected is None:
        return recommender
    if recommender is None:
        recommender = saved.recommender()
    if recommender is None:
        raise ValueError(
            f"from_pretrained: recommender must be given for this Laser, which reads a {expected.kind} that is not "
            "in its folder, got None"
        )
    saved.refuse_another_recommender(recommender, "from_pretrained")
    return recommender


def _refuse(what: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"from_pretrained: {name} must be left out for {what}, got {_name_of(value)}")


def _name_of(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else f"a {type(value).__name__}"
