"""Laser: a frozen language model as a sequential recommender, with its answers and its files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from laser_fast.config import ModelConfig
from laser_fast.data.batches import BatchBuilder
from laser_fast.data.sequences import PackedSequences
from laser_fast.data.tokens import Tokenizer
from laser_fast.files.atomic import refuse_others
from laser_fast.files.locks import claim
from laser_fast.laser.encoder import LaserEncoder
from laser_fast.laser.laser_files import LASER_FILES, LaserContents, Origin, origin_of, write_laser
from laser_fast.laser.model_card import model_card
from laser_fast.laser.pretrained import Items, Recommender, Sources, refuse_given
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.base_model import describe_base
from laser_fast.models.assembly import Foundation, build_parts
from laser_fast.nn.bituning import BiTuning
from laser_fast.ops.precision import autocast_off
from laser_fast.recommenders.protocol import Scorer, check_histories
from laser_fast.retrieval.calibration import CalibratedScorer
from laser_fast.retrieval.inner_product import InnerProductIndex, ScoreBlock
from laser_fast.retrieval.requests import (
    ItemId,
    Recommendation,
    best_items,
    blocked_items,
    name_items,
    pack_histories,
    wanted_items,
)
from laser_fast.retrieval.score_index import KeptIndex, all_scores, make_index, stranger_in

if TYPE_CHECKING:
    from typing_extensions import Self

_Kept = tuple[CalibratedScorer, dict[str, Scorer | None]]


class LaserModel(LaserEncoder, ModelHubMixin):
    """The recommender of the paper, a `Scorer`; its arguments are those of `LaserEncoder`.

    A calibration belongs to one version of the weights, as the item matrix does; one of older weights is refused.

    Attributes:
        origin: what the model was built from; None if it was put together by hand.
    """

    # not None, else the mixin records the constructor's arguments
    _hub_mixin_config: dict[str, Any] | None = {}  # noqa: RUF012

    def __init__(
        self, lm: FrozenLM, builder: BatchBuilder, item_ids: Sequence[str], bituning: BiTuning, **parts: Any
    ) -> None:
        super().__init__(lm, builder, item_ids, bituning, **parts)
        self.origin: Origin | None = None
        self._calibration: _Kept | None = None
        self._index = KeptIndex()

    @classmethod
    def build(cls, foundation: Foundation, split_hash: str | None) -> "Self":
        """A model without an item matrix, initialised from torch's global generator; `split_hash` is recorded."""
        model, base = cls(**build_parts(foundation)), foundation.base
        model.origin = Origin(
            config=foundation.config,
            lm=base.settings,
            base=describe_base(model.lm, base.tokenizer),
            items=foundation.items,
            counts=foundation.counts,
            split_hash=split_hash,
        )
        return model

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

        A folder of `save_pretrained` or of a training run gives the model in it: in evaluation mode, with its item
        matrix and calibration. Anything else is a language model, around which a new Laser is built, initialised from
        torch's global generator; its item matrix comes with `refresh_items`.

        Args:
            pretrained: folder, `package:NAME/FOLDER`, `hub:OWNER/NAME` (or OWNER/NAME where there is no such folder),
                `random:SHAPE`, or a loaded Hugging Face model, with a head or without.
            items: the catalogue of a new Laser: id -> text (the field "title") or text fields, or an `ItemTable`.
            recommender: a `SequentialRecommender` for M-Former to read, or a folder with a trained one; a saved Laser
                has its own, unless that is of another library.
            config: settings of a new Laser: `ModelConfig`, a mapping, or a YAML file.
            llm: where the language model of a saved Laser is now; None = where it was. A name on the hub that only the
                saved Laser gives is read from the cache; pass llm="hub:OWNER/NAME" to fetch it.
            tokenizer: one for a loaded language model, or a folder, or `hub:OWNER/NAME`.
            item_counts: [I], training events of every item of a new Laser; the recommender's states of items with
                none are not read. None = all are known.
            dtype, quantization: of the frozen weights, see `LanguageModelConfig`; None = those of the saved Laser,
                else "auto" and "none". A loaded model stays as it is.
            revision: branch, tag or commit of a hub repository.
            local_files_only: never ask the hub.

        Raises:
            FileNotFoundError: a folder, package or repository does not exist.
            TypeError: items that are no mapping.
            ValueError: arguments or settings that do not fit, or a saved Laser that is damaged or belongs to another
                recommender or language model.
        """
        precision = {"dtype": dtype, "quantization": quantization}
        sources = Sources(
            pretrained=pretrained,
            llm=llm,
            tokenizer=tokenizer,
            recommender=recommender,
            precision={name: value for name, value in precision.items() if value is not None},
            revision=revision,
            local_files_only=local_files_only,
        )
        saved = sources.find_saved()
        if saved is None:
            foundation = sources.of_new(items, config, item_counts)
            return cls.build(foundation, getattr(foundation.recommender, "split_hash", None))
        refuse_given("a saved Laser", items=items, config=config, item_counts=item_counts)
        foundation = sources.of_saved(saved)
        with torch.random.fork_rng(devices=[]):  # the random parameters are overwritten at once
            model = cls.build(foundation, saved.description.split_hash)
        saved.refuse_another_base(model)
        saved.put_into(model)
        model.calibration = saved.calibrated(model, foundation.recommender, torch.from_numpy(foundation.counts))
        return model.eval()

    def contents(self) -> LaserContents:
        """The savable parts; a RuntimeError without `origin`, or for an item matrix or calibration of older weights."""
        if len(self.item_matrix):
            self.current_items()
        if self.calibration is not None:
            self.calibration.refuse_outdated()
        return LaserContents(self, origin_of(self), self.calibration)

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
        """Write the trained parts, and nothing of the language model; whole or not at all.

        Args:
            save_directory: a new or empty folder, or one with nothing but a saved Laser, which is replaced.
            repo_id: its name on the hub; None = that of the folder.
            push_to_hub: upload it too, with `push_arguments`, and return the URL of the commit.
            config: not used.
            model_card_kwargs: `figures`, metrics by name to print in the model card.

        Raises:
            FileExistsError: the folder holds something else.
            ValueError: another process writes it.
            RuntimeError: see `contents`.
        """
        folder = Path(save_directory).resolve()  # a link to a folder elsewhere stays one
        with claim(folder):
            refuse_others("save_pretrained", folder, LASER_FILES)
            contents = self.contents()
            write_laser(contents, folder, model_card(contents, repo_id=repo_id, **(model_card_kwargs or {})))
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or Path(save_directory).name, model_card_kwargs=model_card_kwargs, **push_arguments
        )

    def generate_model_card(self, *_: Any, **figures: Any) -> ModelCard:
        """The model card that is saved with the model."""
        return model_card(self.contents(), **figures)

    @property
    def calibration(self) -> CalibratedScorer | None:
        """The score that `recommend` ranks by; None = cosine over temperature.

        The model keeps it without itself, so that a copy of the model has a calibration of its own.
        """
        return self._join(self._calibration)

    @calibration.setter
    def calibration(self, scorer: CalibratedScorer | None) -> None:
        kept: _Kept | None = None
        if scorer is not None:
            parts = {name: None if part is self else part for name, part in scorer.components.items()}
            kept = scorer.with_components({}), parts
        self._calibration = kept  # at once: other threads may be reading

    def _join(self, kept: _Kept | None) -> CalibratedScorer | None:
        if kept is None:
            return None
        scorer, parts = kept
        return scorer.with_components({name: self if part is None else part for name, part in parts.items()})

    @torch.no_grad()
    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`: cosine of user and item over the temperature, on the model's device."""
        check_histories("LaserModel.score", items, cu_seqlens, self.num_items)
        matrix = self.current_items()
        users = self.encode_users(PackedSequences(items.cpu().numpy(), cu_seqlens.cpu().numpy()))
        with autocast_off(users.device):
            return F.normalize(users, dim=-1) @ F.normalize(matrix, dim=-1).T / self.objective.temperature

    def score_block(self) -> ScoreBlock:
        """`score` as inner products of unit items with unit users over the temperature."""

        def unit_users(histories: PackedSequences) -> Tensor:
            return F.normalize(self.encode_users(histories).float(), dim=-1) / self.objective.temperature

        return ScoreBlock(F.normalize(self.current_items().float(), dim=-1), unit_users)

    def index(self) -> InnerProductIndex:
        """The score that `recommend` ranks by as inner products of item vectors with user vectors.

        It is kept until the item matrix, the calibration, the weights or the device changes, and takes as much memory
        as the item matrix and the output layer of the recommender in float32.

        Raises:
            RuntimeError: no item matrix (`refresh_items`), or it or the calibration is of older weights.
            ValueError: the calibrated score has a part that is no inner product.
        """
        kept, items = self._calibration, self._items
        scorer = self._join(kept) or self
        if (stranger := stranger_in(scorer)) is not None:
            raise ValueError(
                "LaserModel.index: the score must be made of Laser, a recommender with an output layer and rules, "
                f"got {stranger}; use score or recommend"
            )
        versions: object = self.weights.now()
        if isinstance(scorer, CalibratedScorer):
            scorer.refuse_outdated()
            versions = scorer.versions()
        made_of = (self.device, items, items.version.now(), kept, versions)
        return self._index.made_of(made_of, lambda: make_index(scorer, self.device))

    def recommend(
        self,
        histories: Iterable[Iterable[ItemId]],
        k: int = 10,
        *,
        exclude_seen: bool = False,
        exclude: Iterable[ItemId] = (),
        allow: Iterable[ItemId] | None = None,
    ) -> list[list[Recommendation]]:
        """The k best items for each history of external item ids, oldest first.

        Scores are those of `calibration`, else cosine over temperature. Ids outside the catalogue are dropped with one
        warning; an empty history is answered from the prompt alone. All scores, [B, I], are held only where the
        calibration has a part that is no inner product (see `index`), or k is an eighth of the catalogue or more.

        Args:
            histories: B lists (or a column of lists) of external ids; the number 7 names the item "7".
            exclude_seen: leave out the items of the history.
            exclude, allow: ids to leave out, and the only ids to recommend; None = all.

        Returns:
            B lists of at most k, best first, ties by item index.

        Raises:
            TypeError: a history, `exclude` or `allow` that is no list of ids; k that is no whole number.
            ValueError: k below 1, or an id of `exclude` or `allow` that is not in the catalogue.
            RuntimeError: see `index`.
        """
        k = wanted_items(k)
        packed = pack_histories(histories, self.index_of_item)
        blocked = blocked_items(exclude, allow, self.index_of_item)
        scorer = self.calibration or self
        if stranger_in(scorer) is None:
            some = blocked if bool(blocked.any()) else None
            best = self.index().search(packed, min(k, self.num_items), exclude_seen=exclude_seen, blocked=some)
        else:
            scores = all_scores(scorer, packed, blocked, exclude_seen=exclude_seen, device=self.device)
            best = best_items(scores, k)
        return name_items(*best, self.item_ids)
