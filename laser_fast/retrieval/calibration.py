"""Several scorers fused into one by a few scalars, with terms for repeats and popularity."""

import math
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laser_fast.lm.weights_version import WeightsVersion
from laser_fast.recommenders.protocol import Scorer, check_histories, repeat_positions


@dataclass(frozen=True)
class Calibration:
    """The scalars of a `CalibratedScorer`, which are saved with a model."""

    weights: Mapping[str, float]  # factor of each component's score
    standardize: tuple[str, ...] = ()  # components that are z-scored per history before they are weighted
    history_bias: float = 0.0  # added once to every item of the history
    last_bias: float = 0.0  # added to the last item on top of `history_bias`
    popularity_weight: float = 0.0  # factor of log(1 + count)

    def __post_init__(self) -> None:
        unknown = [name for name in self.standardize if name not in self.weights]
        if unknown:
            raise ValueError(
                f"Calibration: standardize must name components, got {unknown}; known: {list(self.weights)}"
            )
        biases = {name: getattr(self, name) for name in ("history_bias", "last_bias", "popularity_weight")}
        scalars = {**biases, **self.weights}
        if wrong := {name: value for name, value in scalars.items() if not math.isfinite(value)}:
            raise ValueError(f"Calibration: weights and biases must be finite, got {wrong}")


class CalibratedScorer:
    """score = sum_c w_c f_c + b_hist [i in history] + b_last [i is last] + p log(1 + count_i). A `Scorer`.

    f_c is a component's score, z-scored over the catalogue for each history where `standardize` names it (0 where all
    its scores are equal). An empty history has neither repeat term.

    Args:
        counts: [I], training events of each item.
    """

    def __init__(self, components: Mapping[str, Scorer], calibration: Calibration, counts: Tensor) -> None:
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
        self._made_at = self.versions()  # of the weights that the scalars were fitted to

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return self.log_counts.numel()

    @property
    def weighted(self) -> dict[str, Scorer]:
        """The components with a weight other than 0."""
        return {name: scorer for name, scorer in self.components.items() if self.calibration.weights[name]}

    def versions(self) -> dict[str, int]:
        """The present `WeightsVersion` of every weighted component that has one."""
        known = {name: getattr(scorer, "weights", None) for name, scorer in self.weighted.items()}
        return {name: version.now() for name, version in known.items() if isinstance(version, WeightsVersion)}

    def refuse_outdated(self) -> None:
        """Raise a RuntimeError if a weighted component has changed since the scalars were fitted."""
        for name, version in self.versions().items():
            if version != self._made_at.get(name):
                raise RuntimeError(
                    "CalibratedScorer: the calibration must belong to the present weights, got one of older weights of "
                    f"{name!r}; fit it again (laser_fast.evaluation.fit_calibration), or set model.calibration = None"
                )

    def without_unused(self, names: Iterable[str]) -> "CalibratedScorer":
        """The same score without those of the named components that have no weight."""
        unused = {name for name in names if not self.calibration.weights.get(name)}
        twin = self.with_components({name: part for name, part in self.components.items() if name not in unused})
        weights = {name: self.calibration.weights[name] for name in twin.components}
        twin.calibration = replace(self.calibration, weights=weights)
        return twin

    def with_components(self, components: Mapping[str, Scorer]) -> "CalibratedScorer":
        """The same scalars over other components, unchecked."""
        twin = copy(self)
        twin.components = dict(components)
        return twin

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`; the result is on the device of `items`. Errors as of `refuse_outdated`."""
        self.refuse_outdated()
        check_histories("CalibratedScorer.score", items, cu_seqlens, self.num_items)
        settings = self.calibration
        popularity = settings.popularity_weight * self.log_counts.to(items.device)
        fused = popularity.expand(cu_seqlens.numel() - 1, -1).clone()
        for name, component in self.weighted.items():
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


def calibration_components(
    laser: Scorer, recommender: Scorer | None, tables: Mapping[str, Scorer]
) -> dict[str, Scorer]:
    """The components of Laser's calibration."""
    return {"laser": laser} | ({} if recommender is None else {"recommender": recommender}) | dict(tables)
