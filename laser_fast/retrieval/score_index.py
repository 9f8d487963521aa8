"""From a scorer to an `InnerProductIndex`: which scores have that form, and the index made of them."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from laser_fast.data.sequences import PackedSequences
from laser_fast.lm.weights_version import WeightsVersion
from laser_fast.recommenders.item_to_item import ItemToItem
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.protocol import Scorer
from laser_fast.retrieval.calibration import CalibratedScorer
from laser_fast.retrieval.inner_product import InnerProductIndex, ScoreBlock, packed_tensors


@runtime_checkable
class ProductScorer(Scorer, Protocol):
    """A scorer whose `score` is the inner product that its `score_block` describes."""

    weights: WeightsVersion

    def score_block(self) -> ScoreBlock:
        """Vectors of the items under the present weights, and what makes those of users."""
        ...


class KeptIndex:
    """The newest index and what it was made of; a copy is empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[object, InnerProductIndex] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptIndex, ()

    def made_of(self, sources: object, make: Callable[[], InnerProductIndex]) -> InnerProductIndex:
        """The index of these sources; one thread makes it, others wait."""
        with self._lock:
            if self._kept is None or self._kept[0] != sources:
                self._kept = None  # gives up its memory first
                self._kept = sources, make()
            return self._kept[1]


def stranger_in(scorer: Scorer) -> str | None:
    """The part of a score that is neither an inner product nor sparse, for a message; None = there is none."""
    if isinstance(scorer, CalibratedScorer) and type(scorer) is not CalibratedScorer:
        return f"a {type(scorer).__name__}"
    parts = scorer.weighted if isinstance(scorer, CalibratedScorer) else {"laser": scorer}
    for name, part in parts.items():
        if not (_is_sparse(name, part, scorer) or _is_product(part)):
            return f"a {type(part).__name__} as {name!r}"
    return None


def make_index(scorer: Scorer, device: torch.device) -> InnerProductIndex:
    """The index of a score without a stranger; it refuses to search once the weights of a part have changed."""
    if not isinstance(scorer, CalibratedScorer):
        return InnerProductIndex([_block_of(scorer, device)])
    settings, blocks, rules = scorer.calibration, [], []
    for name, part in scorer.weighted.items():
        if isinstance(part, ItemToItem) and _is_sparse(name, part, scorer):
            rules.append((part, settings.weights[name]))
        else:
            standardize = name in settings.standardize
            blocks.append(replace(_block_of(part, device), weight=settings.weights[name], standardize=standardize))
    log_counts = scorer.log_counts.to(device)[:, None]
    blocks.append(ScoreBlock(log_counts, lambda histories: torch.ones(len(histories), 1), settings.popularity_weight))
    return InnerProductIndex(blocks, history_bias=settings.history_bias, last_bias=settings.last_bias, rules=rules)


def all_scores(
    scorer: Scorer, histories: PackedSequences, blocked: Tensor, *, exclude_seen: bool, device: torch.device
) -> Tensor:
    """All scores [B, I]; -inf where an item is blocked (bool [I]) or excluded as seen."""
    items, cu_seqlens = packed_tensors(histories, device)
    scores = scorer.score(items, cu_seqlens)
    scores = scores.masked_fill(blocked.to(scores.device), -torch.inf)
    if exclude_seen:
        row = torch.repeat_interleave(cu_seqlens.diff(), output_size=items.numel())
        scores[row.to(scores.device), items.to(scores.device)] = -torch.inf
    return scores


def _is_sparse(name: str, part: Scorer, scorer: Scorer) -> bool:
    """Whether a part is 0 for most items of a user; a z-score is nowhere 0."""
    standardized = isinstance(scorer, CalibratedScorer) and name in scorer.calibration.standardize
    return not standardized and isinstance(part, ItemToItem) and _has(part, ItemToItem, "score", "sparse_score")


def _is_product(part: Scorer) -> bool:
    """Whether `score` is the one that `score_block` or the output layer describes, not one that overrides it."""
    if isinstance(part, PackedRecommender):
        return _has(part, PackedRecommender, "score", "logits")
    says = next((kind for kind in type(part).__mro__ if "score_block" in vars(kind)), None)
    return says is not None and _has(part, says, "score")


def _has(part: Any, kind: type, *methods: str) -> bool:
    """Whether a part has these methods of this class unchanged."""
    return all(getattr(type(part), name) is getattr(kind, name) and name not in vars(part) for name in methods)


def _block_of(part: Scorer, device: torch.device) -> ScoreBlock:
    """The unweighted score of a part, whose queries refuse changed weights."""
    assert isinstance(part, PackedRecommender | ProductScorer)
    made_at = part.weights.now()
    block = _block_of_recommender(part) if isinstance(part, PackedRecommender) else part.score_block()
    queries = block.queries  # a closure over the block would keep its rows, which the index copies

    def queries_of_now(histories: PackedSequences) -> Tensor:
        if part.weights.now() != made_at:
            raise RuntimeError(
                "InnerProductIndex: the index must belong to the present weights, got one of older weights; call "
                "model.index() again"
            )
        return queries(histories)

    return ScoreBlock(block.items.detach().to(device), queries_of_now)


def _block_of_recommender(part: PackedRecommender) -> ScoreBlock:
    weight, bias = part.output_layer()

    def states(histories: PackedSequences) -> Tensor:
        last, filled = part.last_states(*packed_tensors(histories, part.output_layer()[0].device))
        return last if bias is None else torch.cat([last, filled[:, None].to(last)], dim=1)

    return ScoreBlock(weight if bias is None else torch.cat([weight, bias[:, None]], dim=1), states)
