"""What a `LaserModel` answers with: scores, an index of inner products, and the best items for a history."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.data.sequences import PackedSequences
from laser_fast.ops.precision import autocast_off
from laser_fast.recommenders.item_to_item import ItemToItem
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.protocol import Scorer, check_histories
from laser_fast.retrieval.calibration import CalibratedScorer
from laser_fast.retrieval.inner_product import InnerProductIndex, ScoreBlock, packed_tensors
from laser_fast.retrieval.requests import (
    ItemId,
    Recommendation,
    best_items,
    blocked_items,
    name_items,
    pack_histories,
    wanted_items,
)

if TYPE_CHECKING:
    from laser_fast.laser.model import LaserModel


class RecommendingLaser:
    """`score`, `index` and `recommend` of `LaserModel`."""

    _kept_index: "tuple[_Sources, InnerProductIndex] | None" = None

    @torch.no_grad()
    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Cosine of each user with each item over the temperature: float32 [B, I]; nothing is filtered.

        Args:
            items: int64 [N], histories, oldest first.
            cu_seqlens: int32 [B+1].

        Raises:
            RuntimeError: no item matrix yet, or one of older weights (`refresh_items`).
        """
        model = cast("LaserModel", self)
        check_histories("LaserModel.score", items, cu_seqlens, model.num_items)
        matrix = model.current_items()
        users = model.encode_users(PackedSequences(items.cpu().numpy(), cu_seqlens.cpu().numpy()))
        with autocast_off(users.device):
            return F.normalize(users, dim=-1) @ F.normalize(matrix, dim=-1).T / model.temperature

    def index(self) -> InnerProductIndex:
        """The score that `recommend` ranks by as inner products of item vectors with user vectors.

        Kept until the item matrix, the calibration, the weights or the device changes. An index of older weights, of
        the recommender as well, refuses to search. It takes as much memory as the item matrix and, beside it, the
        output layer of the recommender in float32.

        Raises:
            RuntimeError: no item matrix yet (`refresh_items`), or it or the calibration is of older weights.
            ValueError: the calibrated score has a part that is no inner product.
        """
        model = cast("LaserModel", self)
        stranger = _stranger(model)
        if stranger is not None:
            raise ValueError(
                "LaserModel.index: the score must be made of Laser, a recommender with an output layer and rules, "
                f"got {stranger}; use score or recommend"
            )
        if model.calibration is not None:
            model.calibration.refuse_outdated()
        with model._making_index:  # one thread makes it, the others wait for it
            sources, kept = _Sources.of(model), self._kept_index
            if kept is None or not kept[0].same_as(sources):
                self._kept_index = kept = None  # its memory first
                self._kept_index = kept = sources, _index_of(model)
            return kept[1]

    def recommend(
        self,
        histories: Iterable[Iterable[ItemId]],
        k: int = 10,
        *,
        exclude_seen: bool = False,
        exclude: Iterable[ItemId] = (),
        allow: Iterable[ItemId] | None = None,
    ) -> list[list[Recommendation]]:
        """The k best items for each history of external item ids, oldest first; nobody needs to be a known user.

        Scores are calibrated where the model carries a calibration, else cosine over temperature. Ids that are not in
        the catalogue are dropped with one warning; an empty history is served from the prompt alone. The scores of the
        whole catalogue are held together only where the calibration has a part that is no inner product (see `index`),
        or k is an eighth of the catalogue or more.

        Args:
            histories: B lists (or a column of lists) of external ids; the number 7 names the item "7".
            k: items wanted; the list is shorter when fewer are left.
            exclude_seen: leave out the items of the history.
            exclude: ids nobody gets.
            allow: the only ids anybody gets; None = all.

        Returns:
            B lists of `Recommendation`, best first, ties by item index.

        Raises:
            TypeError: a history, `exclude` or `allow` that is no list of ids, a string above all; k that is no whole
                number.
            ValueError: k below 1, or an id of `exclude` or `allow` that is not in the catalogue.
            RuntimeError: no item matrix yet, or one of older weights (`refresh_items`), or such a calibration.
        """
        k = wanted_items(k)
        model = cast("LaserModel", self)
        packed = pack_histories(histories, model.index_of_item)
        blocked = blocked_items(exclude, allow, model.index_of_item)
        if _stranger(model) is None:
            wanted = blocked if bool(blocked.any()) else None
            best = self.index().search(packed, min(k, model.num_items), exclude_seen=exclude_seen, blocked=wanted)
        else:
            best = best_items(_all_scores(model, packed, blocked, exclude_seen), k)
        return name_items(*best, model.item_ids)


def _all_scores(model: "LaserModel", histories: PackedSequences, blocked: Tensor, exclude_seen: bool) -> Tensor:
    """The score of `recommend` for every item: [B, I], -inf for those that may not be recommended."""
    scorer: Scorer = model if model.calibration is None else model.calibration
    items, cu_seqlens = packed_tensors(histories, model.device)
    scores = scorer.score(items, cu_seqlens)
    scores = scores.masked_fill(blocked.to(scores.device), -torch.inf)
    if exclude_seen:
        row = torch.repeat_interleave(cu_seqlens.diff(), output_size=items.numel())
        scores[row.to(scores.device), items.to(scores.device)] = -torch.inf
    return scores


def _parts(model: "LaserModel") -> dict[str, Any]:
    """The scorers that the score of `recommend` adds up."""
    if model.calibration is None:
        return {"laser": model}
    weights = model.calibration.calibration.weights
    return {name: scorer for name, scorer in model.calibration.components.items() if weights[name]}


def _stranger(model: "LaserModel") -> str | None:
    """What in the score of `recommend` is not known to be an inner product; None = nothing."""
    if model.calibration is not None and type(model.calibration) is not CalibratedScorer:
        return f"a {type(model.calibration).__name__}"
    for name, scorer in _parts(model).items():
        if _is_sparse(name, scorer, model):
            continue
        if not (_has(scorer, RecommendingLaser, "score") or _has(scorer, PackedRecommender, "score", "logits")):
            return f"a {type(scorer).__name__} as {name!r}"
    return None


def _is_sparse(name: str, scorer: Any, model: "LaserModel") -> bool:
    """Whether a component differs from 0 for few items of a user."""
    standardized = () if model.calibration is None else model.calibration.calibration.standardize
    return name not in standardized and _has(scorer, ItemToItem, "score", "sparse_score")


def _has(scorer: Any, kind: type, *methods: str) -> bool:
    """Whether it is of this kind, with these methods as they are there."""
    return isinstance(scorer, kind) and all(
        getattr(type(scorer), name) is getattr(kind, name) and name not in vars(scorer) for name in methods
    )


def _index_of(model: "LaserModel") -> InnerProductIndex:
    if model.calibration is None:
        return InnerProductIndex([_block_of(model, model)])
    settings = model.calibration.calibration
    blocks = [
        replace(_block_of(scorer, model), weight=settings.weights[name], standardize=name in settings.standardize)
        for name, scorer in _parts(model).items()
        if not _is_sparse(name, scorer, model)
    ]
    rules = [
        (scorer, settings.weights[name]) for name, scorer in _parts(model).items() if _is_sparse(name, scorer, model)
    ]
    log_counts = model.calibration.log_counts.to(model.device)[:, None]
    blocks.append(ScoreBlock(log_counts, lambda histories: torch.ones(len(histories), 1), settings.popularity_weight))
    return InnerProductIndex(blocks, history_bias=settings.history_bias, last_bias=settings.last_bias, rules=rules)


def _block_of(scorer: "LaserModel | PackedRecommender", model: "LaserModel") -> ScoreBlock:
    """The score of a Laser or a recommender as it stands, unweighted."""
    made_at = scorer.weights.now()
    rows, queries = _rows_and_queries(scorer)

    def queries_of_now(histories: PackedSequences) -> Tensor:
        if scorer.weights.now() != made_at:
            raise RuntimeError(
                "InnerProductIndex: the index must belong to the weights of now, got one of older weights; call "
                "model.index() again"
            )
        return queries(histories)

    return ScoreBlock(rows.detach().to(model.device), queries_of_now)


def _rows_and_queries(
    scorer: "LaserModel | PackedRecommender",
) -> tuple[Tensor, Callable[[PackedSequences], Tensor]]:
    """See `ScoreBlock`."""
    if isinstance(scorer, PackedRecommender):
        weight, bias = scorer.output_layer()

        def states(histories: PackedSequences) -> Tensor:
            last, filled = scorer.last_states(*packed_tensors(histories, scorer.output_layer()[0].device))
            return last if bias is None else torch.cat([last, filled[:, None].to(last)], dim=1)

        return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1), states

    def unit_users(histories: PackedSequences) -> Tensor:
        return F.normalize(scorer.encode_users(histories).float(), dim=-1) / scorer.temperature

    return F.normalize(scorer.current_items().float(), dim=-1), unit_users


@dataclass(frozen=True, eq=False)
class _Sources:
    """What an index is made of, so that a change is noticed without reading any values.

    Attributes:
        versions: of the weights of every scorer that has some.
        tensors: each with an alias, which keeps its memory from becoming another tensor's, and its version.
    """

    device: torch.device
    settings: dict[str, Any] | None
    versions: tuple[int, ...]
    scorers: tuple[Any, ...]
    tensors: tuple[tuple[Tensor, Tensor, int], ...]

    @classmethod
    def of(cls, model: "LaserModel") -> "_Sources":
        tensors: list[Tensor] = []
        versions: list[int] = []
        scorers = _parts(model)
        for scorer in scorers.values():
            if isinstance(scorer, RecommendingLaser):
                laser = cast("LaserModel", scorer)
                tensors.append(laser.current_items())
                versions.append(laser._items_belong_to)  # that of now, or there would be no current items
            elif not isinstance(scorer, ItemToItem):  # whose table is read at every request
                versions.append(scorer.weights.now())
        settings = None
        if model.calibration is not None:
            settings = model.calibration.calibration.to_dict()
            tensors.append(model.calibration.log_counts)
        # tensors of inference mode have no version
        known = tuple((one, one.detach(), -1 if one.is_inference() else one._version) for one in tensors)
        return cls(model.device, settings, tuple(versions), tuple(scorers.values()), known)

    def same_as(self, other: "_Sources") -> bool:
        """Whether an index made of the other is one made of this."""
        return (
            self.device == other.device
            and self.settings == other.settings
            and self.versions == other.versions
            and (len(self.scorers), len(self.tensors)) == (len(other.scorers), len(other.tensors))
            and all(one is two for one, two in zip(self.scorers, other.scorers, strict=True))
            and all(
                one is two and version == known and alias.data_ptr() == then.data_ptr() and alias.dtype == then.dtype
                for (one, alias, version), (two, then, known) in zip(self.tensors, other.tensors, strict=True)
            )
        )
