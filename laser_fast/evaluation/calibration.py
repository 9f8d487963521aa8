"""Fit the scalars of a `CalibratedScorer` on validation rows: coordinate search for the best NDCG@10."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from laser_fast.evaluation.evaluate import row_batches
from laser_fast.evaluation.metrics import rank_values
from laser_fast.models.calibration import CalibratedScorer, Calibration, repeat_positions, standard_scores
from laser_fast.models.recommender import Scorer

if TYPE_CHECKING:
    from laser_fast.data import EvaluationRows

_METRIC = "NDCG@10"
_HISTORY, _LAST, _POPULARITY = "history_bias", "last_bias", "popularity_weight"
# in units of the first component's deviation over the catalogue, so that no grid depends on a scorer's scale
_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
_BIASES = (-16.0, -8.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
_POPULARITIES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
_FINE = (0.7, 0.85, 1.0, 1.18, 1.4)  # the last round: factors around what was found
_ROWS_PER_CHUNK = 64  # a chunk of scores stays in the cache while a whole grid is tried on it


def fit_calibration(
    components: Mapping[str, Scorer],
    rows: EvaluationRows,
    counts: Tensor,
    **options: Any,
) -> CalibratedScorer:
    """`search_calibration` without the metric it reached."""
    return search_calibration(components, rows, counts, **options)[0]


@torch.no_grad()
def search_calibration(
    components: Mapping[str, Scorer],
    rows: EvaluationRows,
    counts: Tensor,
    *,
    standardize: Iterable[str] = (),
    coarse_rounds: int = 2,
    max_scores: int = 2**26,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[CalibratedScorer, float]:
    """Maximise NDCG@10 on `rows` over one scalar at a time, on fixed grids; deterministic.

    A common factor changes no ranking, so the first component keeps weight 1 and sets the unit of the others.
    Components are scored once. A scalar moves only for a strictly better NDCG@10, so useless terms stay at 0.

    Args:
        components: name -> scorer; put the one you trust most first.
        rows: validation rows, never test rows.
        counts: [I], events of each item in the training part.
        standardize: components to z-score per history (see `Calibration`).
        coarse_rounds: passes over all scalars on the coarse grids, before one fine pass.
        max_scores: scores held per component (4 bytes each); of more rows an evenly spaced part is used.
        batch_size: rows scored at a time.
        device: where the histories are put before `score`.
        progress: show a bar.

    Returns:
        The fused scorer, and its NDCG@10 on the rows that were used.

    Raises:
        ValueError: no rows or no component, or names that do not fit.
    """
    if not len(rows):
        raise ValueError("fit_calibration: rows must not be empty, got 0 rows")
    names = list(components)
    if reserved := {_HISTORY, _LAST, _POPULARITY} & set(names):
        raise ValueError(f"fit_calibration: components must not be called like a term, got {sorted(reserved)}")
    start = Calibration(dict.fromkeys(names, 0.0) | dict.fromkeys(names[:1], 1.0), tuple(standardize))
    CalibratedScorer(components, start, counts)  # its checks come before minutes of scoring
    if len(rows) * counts.numel() > max_scores:
        wanted = max(1, max_scores // counts.numel())
        rows = rows.select(np.linspace(0, len(rows) - 1, wanted).round().astype(np.int64))
    terms = _Terms(components, start.standardize, rows, counts, batch_size, device, progress)
    values = dict.fromkeys(terms.names, 0.0) | {names[0]: 1.0}
    free = [_HISTORY, _LAST, *names[1:], _POPULARITY]
    best = terms.quality(values, free[0], [values[free[0]]])[0]
    with tqdm(total=(coarse_rounds + 1) * len(free), desc="calibrate", unit="scalar", disable=not progress) as bar:
        for round_index in range(coarse_rounds + 1):
            for name in free:
                grid = _coarse_grid(name) if round_index < coarse_rounds else [values[name] / f for f in _FINE]
                found = terms.quality(values, name, grid)
                place = int(np.argmax(found))
                if found[place] > best:
                    best, values[name] = found[place], grid[place]
                bar.set_postfix_str(f"{_METRIC} {best:.4f}")
                bar.update()
    scalars = {name: value * terms.units[name] for name, value in values.items()}
    fitted = Calibration(
        {name: scalars[name] for name in names},
        start.standardize,
        scalars[_HISTORY],
        scalars[_LAST],
        scalars[_POPULARITY],
    )
    return CalibratedScorer(components, fitted, counts), best


def _coarse_grid(name: str) -> list[float]:
    grids = {_HISTORY: _BIASES, _LAST: _BIASES, _POPULARITY: _POPULARITIES}
    return list(grids.get(name, _WEIGHTS))


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
            batches = tqdm(
                row_batches(rows, batch_size, device),
                desc=f"score {name}",
                total=-(-len(rows) // batch_size),
                disable=not progress,
            )
            parts = [component.score(items, cu_seqlens).float().cpu() for items, cu_seqlens, _ in batches]
            scores = torch.cat([standard_scores(part) for part in parts] if name in standardize else parts)
            if bool(torch.isnan(scores).any()):
                raise ValueError(f"fit_calibration: scores must not be NaN, got NaN from component {name!r}")
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
        for start in range(0, self.targets.numel(), _ROWS_PER_CHUNK):
            chunk = np.arange(start, min(start + _ROWS_PER_CHUNK, self.targets.numel()))
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
