"""Several scorers fused into one, with terms for repeats and popularity: a few scalars on top of frozen scores."""

import math
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laser_fast.lm.weights_version import WeightsVersion
from laser_fast.recommenders.protocol import Scorer, check_histories, repeat_positions


@dataclass(frozen=True)
class Calibration:
    """The scalars of a `CalibratedScorer`; what is saved with a model.

    Attributes:
        weights: component name -> factor of its score.
        standardize: components that are z-scored per history over the catalogue before they are weighted.
        history_bias: added to every item of the history (once, however often it occurs there).
        last_bias: added to the last item of the history, on top of `history_bias`.
        popularity_weight: factor of log(1 + count).
    """

    weights: Mapping[str, float]
    standardize: tuple[str, ...] = ()
    history_bias: float = 0.0
    last_bias: float = 0.0
    popularity_weight: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.standardize if name not in self.weights]
        if unknown:
            raise ValueError(
                f"Calibration: standardize must name components, got {unknown}; known: {list(self.weights)}"
            )
        scalars = {"history_bias": self.history_bias, "last_bias": self.last_bias}
        scalars |= {"popularity_weight": self.popularity_weight, **self.weights}
        if wrong := {name: value for name, value in scalars.items() if not math.isfinite(value)}:
            raise ValueError(f"Calibration: weights and biases must be finite, got {wrong}")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and names, ready for JSON."""
        return asdict(self)


class CalibratedScorer:
    """score = sum_c w_c f_c + b_hist [i in history] + b_last [i is last] + p log(1 + count_i).

    f_c is a component's score, z-scored over the catalogue for each history where `standardize` names it (0 where all
    its scores are equal). An empty history has neither repeat term. Satisfies `Scorer`.
    """

    def __init__(self, components: Mapping[str, Scorer], calibration: Calibration, counts: Tensor) -> None:
        """
        Args:
            components: name -> scorer, all over one catalogue.
            calibration: the scalars; its weights name exactly these components.
            counts: [I], events of each item in the training part.

        Raises:
            ValueError: names differ, no component, or catalogues of different size.
        """
        if not components or set(components) != set(calibration.weights):
            raise ValueError(
                "CalibratedScorer: components must be those with a weight, "
                f"got {sorted(components)} and {sorted(calibration.weights)}"
            )
        sizes = {name: scorer.num_items for name, scorer in components.items()}
        if set(sizes.values()) != {counts.numel()}:
            raise ValueError(
                f"CalibratedScorer: components and counts must share a catalogue, got {sizes} and {counts.numel()}"
            )
        self.components = dict(components)
        self.calibration = calibration
        self.log_counts = torch.log1p(counts.float())
        self.num_items = counts.numel()
        self._made_at = {name: (version, version.now()) for name, version in self._versions().items()}

    def _versions(self) -> dict[str, WeightsVersion]:
        """Of the components with a weight that have one."""
        known = {name: getattr(scorer, "weights", None) for name, scorer in self.components.items()}
        return {
            name: version
            for name, version in known.items()
            if isinstance(version, WeightsVersion) and self.calibration.weights[name]
        }

    def refuse_outdated(self) -> None:
        """Make sure that the scalars belong to the models of now: they weigh the scores of these against each other.

        Raises:
            RuntimeError: the weights of one have changed since it was put in.
        """
        for name, version in self._versions().items():
            known, made_at = self._made_at.get(name, (None, 0))
            if known is not version:  # who puts another component in says that it belongs here
                self._made_at[name] = version, version.now()
            elif version.now() != made_at:
                raise RuntimeError(
                    f"CalibratedScorer: the calibration must belong to the weights of now, got one of older weights of "
                    f"{name!r}; fit it again (laser_fast.evaluation.fit_calibration), or set model.calibration = None"
                )

    def without_unused(self, names: Iterable[str]) -> "CalibratedScorer":
        """The same score without those of these components that have no weight, which need not be saved then."""
        unused = {name for name in names if not self.calibration.weights.get(name)}
        kept = {name: scorer for name, scorer in self.components.items() if name not in unused}
        weights = {name: self.calibration.weights[name] for name in kept}
        scorer = copy(self)
        scorer.components, scorer.calibration = kept, replace(self.calibration, weights=weights)
        return scorer

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`; the result is on the device of `items`.

        Raises:
            RuntimeError: see `refuse_outdated`.
        """
        self.refuse_outdated()
        check_histories("CalibratedScorer.score", items, cu_seqlens, self.num_items)
        settings = self.calibration
        fused = (
            (settings.popularity_weight * self.log_counts.to(items.device)).expand(cu_seqlens.numel() - 1, -1).clone()
        )
        for name, component in self.components.items():
            if settings.weights[name]:
                scores = component.score(items, cu_seqlens).to(items.device)
                fused += settings.weights[name] * (standard_scores(scores) if name in settings.standardize else scores)
        seen, last = repeat_positions(items, cu_seqlens, self.num_items)
        fused.view(-1)[seen] += settings.history_bias
        fused.view(-1)[last] += settings.last_bias
        return fused


def standard_scores(scores: Tensor) -> Tensor:
    """(score - mean) / deviation of each row of [B, I]; rows of equal scores become 0."""
    centred = scores.float() - scores.float().mean(dim=1, keepdim=True)
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    # rounding leaves a constant row with a deviation of about eps times its level
    level = scores.float().abs().amax(dim=1, keepdim=True)
    return torch.where(deviation > 1e-6 * level, centred / deviation.clamp_min(1e-30), 0.0)
