"""Fit the scalars of a `CalibratedScorer` on validation rows: first the likelihood of the targets, then NDCG@10.

The fused score is linear in its scalars, so the likelihood of the targets under its softmax has one maximum. NDCG@10 is
what counts, but it is a staircase with many local maxima: it is searched around that maximum, one scalar at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from laser_fast.evaluation.evaluate import row_scores
from laser_fast.evaluation.metrics import rank_values
from laser_fast.recommenders.protocol import Scorer, repeat_positions
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration, standard_scores

if TYPE_CHECKING:
    from laser_fast.data import EvaluationRows

_METRIC = "NDCG@10"
_HISTORY, _LAST, _POPULARITY = "history_bias", "last_bias", "popularity_weight"
_FACTORS = ((0.6, 0.8, 1.0, 1.25, 1.6), (0.6, 0.8, 1.0, 1.25, 1.6), (0.7, 0.85, 1.0, 1.18, 1.4))  # of each round
_RIDGE = 1e-4  # keeps scalars finite where the rows do not bound them
_TOLERANCES = {"ftol": 1e-15, "gtol": 1e-8, "maxiter": 1000}  # tight: the scalars must not depend on the stop
_MAX_SCORES = 2**26  # held per component, 4 bytes each; of more rows an evenly spaced part is used
_ROWS_PER_CHUNK = 64  # a chunk of scores stays in the cache while a grid is tried on it
_SCORES_PER_CHUNK = 2**22  # of one term


@torch.no_grad()
def fit_calibration(
    components: Mapping[str, Scorer],
    rows: EvaluationRows,
    counts: Tensor,
    *,
    standardize: Iterable[str] = (),
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[CalibratedScorer, float]:
    """Maximise NDCG@10 on `rows`, from the scalars of the most likely targets; deterministic.

    Components are scored once. Weights of components and of popularity are not negative. A term without which NDCG@10
    is no lower gets weight 0. The first component has weight 1 unless it is left out: a common factor changes no
    ranking.

    Args:
        components: name -> scorer; the first sets the unit of the others.
        rows: validation rows, never test rows.
        counts: [I], events of each item in the training part.
        standardize: components to z-score per history (see `Calibration`).
        batch_size, device, progress: as in `evaluate`.

    Returns:
        The fused scorer, and its NDCG@10 on the rows that were used.
    """
    if not len(rows):
        raise ValueError("fit_calibration: rows must not be empty, got 0 rows")
    names = list(components)
    if reserved := {_HISTORY, _LAST, _POPULARITY} & set(names):
        raise ValueError(f"fit_calibration: components must not be called like a term, got {sorted(reserved)}")
    start = Calibration(dict.fromkeys(names, 0.0) | dict.fromkeys(names[:1], 1.0), tuple(standardize))
    CalibratedScorer(components, start, counts)  # checks before minutes of scoring
    if len(rows) * counts.numel() > _MAX_SCORES:
        wanted = max(1, _MAX_SCORES // counts.numel())
        rows = rows.select(np.linspace(0, len(rows) - 1, wanted).round().astype(np.int64))
    terms = _Terms(components, start.standardize, rows, counts, batch_size, device, progress)
    values, best = _climb(terms, _likeliest(terms, [*names, _POPULARITY]), progress)
    values, best = _without_useless(terms, values, best)
    scale = values[names[0]] or 1.0
    scalars = {name: value / scale * terms.units[name] for name, value in values.items()}
    weights = {name: scalars.pop(name) for name in names}
    fitted = Calibration(weights, start.standardize, **scalars)
    return CalibratedScorer(components, fitted, counts), best


def _likeliest(terms: _Terms, non_negative: list[str]) -> dict[str, float]:
    """Scalars, in units, that maximise the likelihood of the targets."""
    bounds = [(0.0 if name in non_negative else None, None) for name in terms.names]
    found = minimize(
        terms.cross_entropy, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds, options=_TOLERANCES
    )
    return dict(zip(terms.names, found.x.tolist(), strict=True))


def _climb(terms: _Terms, values: dict[str, float], progress: bool) -> tuple[dict[str, float], float]:
    """The scalars of the best NDCG@10 by factors of one scalar at a time, and that NDCG@10."""
    free = [name for name in terms.names[1:] if values[name]]
    best = terms.quality(values, terms.names[0], [values[terms.names[0]]])[0]
    with tqdm(total=len(_FACTORS) * len(free), desc="calibrate", unit="scalar", disable=not progress) as bar:
        for factors in _FACTORS:
            for name in free:
                grid = [values[name] * factor for factor in factors]
                found = terms.quality(values, name, grid)
                place = int(np.argmax(found))
                if found[place] > best:
                    best, values[name] = found[place], grid[place]
                bar.set_postfix_str(f"{_METRIC} {best:.4f}")
                bar.update()
    return values, best


def _without_useless(terms: _Terms, values: dict[str, float], best: float) -> tuple[dict[str, float], float]:
    """Leave out each term without which NDCG@10 is no lower, the smallest first."""
    for name in sorted(filter(values.__getitem__, terms.names), key=lambda name: abs(values[name])):
        without = terms.quality(values, name, [0.0])[0]
        if without >= best and any(value for other, value in values.items() if other != name):
            values[name], best = 0.0, without
    return values, best


class _Terms:
    """Every term of the fused score for all rows, in units of the first component's deviation."""

    def __init__(
        self,
        components: Mapping[str, Scorer],
        standardize: tuple[str, ...],
        rows: EvaluationRows,
        counts: Tensor,
        batch_size: int,
        device: torch.device | str,
        progress: bool,
    ) -> None:
        self.scores: dict[str, Tensor] = {}
        for name, component in components.items():
            batches = row_scores("fit_calibration", component, rows, batch_size, device)
            bar = tqdm(batches, desc=f"score {name}", total=-(-len(rows) // batch_size), disable=not progress)
            parts = [scores.float().cpu() for scores, _ in bar]
            scores = torch.cat([standard_scores(part) for part in parts] if name in standardize else parts)
            if not bool(torch.isfinite(scores).all()):
                bad = scores[~torch.isfinite(scores)][0].item()
                raise ValueError(f"fit_calibration: scores must be finite, got {bad} from component {name!r}")
            self.scores[name] = scores
        self.targets = torch.tensor(rows.targets)
        self.log_counts = torch.log1p(counts.float().cpu())
        self.num_items = counts.numel()
        self.histories = rows.histories
        self.names = [*components, _HISTORY, _LAST, _POPULARITY]
        deviation = {name: scores.std(dim=1).mean().item() for name, scores in self.scores.items()}
        unit = deviation[next(iter(components))] or 1.0
        spread = self.log_counts.std().item() if self.num_items > 1 else 0.0
        self.units = {name: unit / (size or 1.0) for name, size in deviation.items()}
        self.units |= {_HISTORY: unit, _LAST: unit, _POPULARITY: unit / (spread or 1.0)}

    def quality(self, values: Mapping[str, float], name: str, grid: list[float]) -> list[float]:
        """Mean metric over the rows for each value of `name` in `grid`, the other scalars as in `values`."""
        totals = torch.zeros(len(grid), dtype=torch.float64)
        for chunk in self._chunks():
            base = torch.zeros(len(chunk), self.num_items)
            for other in self.names:
                if other != name and values[other]:
                    base += values[other] * self._term(other, chunk)
            direction = self._term(name, chunk)
            targets = self.targets[chunk][:, None]
            for place, value in enumerate(grid):
                scores = torch.add(base, direction, alpha=value)
                ranks = (scores >= scores.gather(1, targets)).sum(dim=1)
                totals[place] += rank_values(ranks, _METRIC).sum()
        return (totals / self.targets.numel()).tolist()

    def cross_entropy(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean cross-entropy of the targets with a ridge, and its gradient in the scalars, both float64 [T]."""
        loss, gradient = 0.0, np.zeros(len(values))
        for chunk in self._chunks():
            terms = [self._term(name, chunk) for name in self.names]
            scores = torch.zeros(len(chunk), self.num_items, dtype=torch.float64)
            for value, term in zip(values.tolist(), terms, strict=True):
                scores.add_(term, alpha=value)
            targets, log_shares = self.targets[chunk][:, None], scores.log_softmax(dim=1)
            loss -= float(log_shares.gather(1, targets).sum())
            surplus = log_shares.exp().scatter_add_(1, targets, torch.full_like(targets, -1, dtype=torch.float64))
            for place, term in enumerate(terms):
                gradient[place] += float(torch.linalg.vecdot(surplus, term.double()).sum())
        rows = self.targets.numel()
        return loss / rows + 0.5 * _RIDGE * float(values @ values), gradient / rows + _RIDGE * values

    def _chunks(self) -> list[np.ndarray]:
        size = max(1, min(_ROWS_PER_CHUNK, _SCORES_PER_CHUNK // self.num_items))
        rows = np.arange(self.targets.numel())
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _term(self, name: str, chunk: np.ndarray) -> Tensor:
        """One term with scalar 1 (in units) for the rows of `chunk`: [b, I]."""
        unit = self.units[name]
        if name in self.scores:
            return unit * self.scores[name][chunk[0] : chunk[-1] + 1]
        if name == _POPULARITY:
            return (unit * self.log_counts).expand(len(chunk), -1)
        histories = self.histories.select(chunk)
        places = repeat_positions(torch.tensor(histories.items), torch.tensor(histories.cu_seqlens), self.num_items)
        term = torch.zeros(len(chunk), self.num_items)
        term.view(-1)[places[0] if name == _HISTORY else places[1]] = unit
        return term
