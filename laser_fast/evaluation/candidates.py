"""Sampled rankings: every target among a few candidates, drawn with a seed and kept with the hash of their rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from laser_fast.evaluation.evaluate import row_scores
from laser_fast.evaluation.metrics import MetricValue, RankingMetrics, metric_names, or_none, rank_values
from laser_fast.files.atomic import replace_file
from laser_fast.files.descriptions import Description, parse_description
from laser_fast.files.tensors import open_tensors
from laser_fast.recommenders.protocol import Scorer

if TYPE_CHECKING:
    from laser_fast.data import EvaluationRows

Sampler = Literal["uniform", "popularity"]
_LLARA_CANDIDATES, _LLARA_SHOWN = 20, 10
_FORMAT = 2
_MOST_ITEMS = 2**31  # of all rankings together: 16 GiB


class _About(Description):
    """What a file of candidates holds beside the items; the SHA-256 is over everything."""

    format: int
    sampler: Sampler
    seed: int
    rows_hash: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Candidates:
    """The items that every row's target is ranked against, D times."""

    items: np.ndarray  # int64 [D, B, C], distinct within a ranking; the first is the target
    sampler: Sampler
    seed: int
    rows_hash: str  # SHA-256 of the rows they were drawn for

    @property
    def suffix(self) -> str:
        """The end of the metrics' names, "|sampled100" or "|popularity100", which no full ranking has."""
        return f"|{'sampled' if self.sampler == 'uniform' else self.sampler}{self.items.shape[2]}"

    def check_rows(self, rows: EvaluationRows, num_items: int) -> None:
        """Raise ValueError for rows or a catalogue that these candidates were not drawn for."""
        if (actual := _hash_of_rows(rows)) != self.rows_hash:
            raise ValueError(
                f"Candidates: rows must be those the candidates were drawn for, {self.rows_hash[:12]}, "
                f"got {actual[:12]}; draw anew"
            )
        if self.items.size and not 0 <= self.items.min() <= self.items.max() < num_items:
            worst = self.items.min() if self.items.min() < 0 else self.items.max()
            raise ValueError(f"Candidates: items must be in 0..{num_items - 1}, got {worst}")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically."""
        about = {"format": _FORMAT, "sampler": self.sampler, "seed": self.seed, "rows_hash": self.rows_hash}
        about |= {"sha256": self._digest()}
        content = save({"items": np.ascontiguousarray(self.items)}, {"about": json.dumps(about)})
        replace_file(Path(path).resolve(), content)  # a link to a file elsewhere stays one

    def _digest(self) -> str:
        facts = f"{self.sampler} {self.seed} {self.rows_hash} {self.items.dtype} {self.items.shape}"
        digest = hashlib.sha256(facts.encode())
        digest.update(np.ascontiguousarray(self.items).data)
        return digest.hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Candidates:
        """Read what `save` wrote; ValueError for another file or a damaged one."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"Candidates.load: the path must be a file, got {str(path)!r}")
        name = Path(path).name
        with open_tensors(Path(path), "Candidates.load") as stream:
            written, items = (stream.metadata() or {}).get("about", "{}"), stream.get_tensor("items").clone().numpy()
        where, version = f"Candidates.load: the description in {name}", ("format", _FORMAT)
        about = parse_description(_About, written, where, version=version, remedy="draw the candidates again")
        found = cls(items, about.sampler, about.seed, about.rows_hash)
        if (digest := found._digest()) != about.sha256:
            raise ValueError(
                f"Candidates.load: {name} must be the file that was written, with SHA-256 {about.sha256[:12]}, "
                f"got {digest[:12]}; copy it again"
            )
        return found


def _hash_of_rows(rows: EvaluationRows) -> str:
    """SHA-256 over histories and targets."""
    digest = hashlib.sha256()
    for array in (rows.histories.items, rows.histories.cu_seqlens, rows.targets):
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(array, dtype="<i8").data)
    return digest.hexdigest()


def draw_candidates(
    rows: EvaluationRows,
    num_items: int,
    num_candidates: int,
    *,
    draws: int = 1,
    seed: int = 0,
    counts: np.ndarray | None = None,
    shown: int | None = None,
) -> Candidates:
    """The target of every row and `num_candidates` - 1 distinct items outside its history, D times.

    A row's candidates follow from the seed, the draw and the row's number.

    Args:
        rows: B rows.
        num_items: I.
        num_candidates: C, the target included.
        draws: D.
        counts: [I], events of each item in the training part, to which the chance of an item is proportional; None for
            uniform draws from the catalogue.
        shown: newest history items that may not be candidates; None for all.
    """
    least = {"num_candidates": (num_candidates, 2), "draws": (draws, 1), "seed": (seed, 0), "shown": (shown or 0, 0)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"draw_candidates: {name} must be at least {smallest}, got {value}")
    if draws * len(rows) * num_candidates > _MOST_ITEMS:
        raise ValueError(
            f"draw_candidates: draws x rows x num_candidates must be at most {_MOST_ITEMS:,}, "
            f"got {draws} x {len(rows)} x {num_candidates}"
        )
    if counts is not None and (counts.shape != (num_items,) or (counts < 0).any()):
        raise ValueError(f"draw_candidates: counts must be {num_items} numbers of at least 0, got shape {counts.shape}")
    histories = rows.histories if shown is None else rows.histories.truncate_left(shown)
    log_counts = None if counts is None else np.log(np.where(counts > 0, counts, 1))
    items = np.empty((draws, len(rows), num_candidates), dtype=np.int64)
    items[:, :, 0] = rows.targets
    for row in range(len(rows)):
        barred = np.unique(np.append(histories[row], rows.targets[row]))
        if counts is not None:
            barred = np.union1d(barred, np.flatnonzero(counts == 0))
        left = num_items - len(barred)
        if left < num_candidates - 1:
            raise ValueError(
                f"draw_candidates: num_candidates must be at most {left + 1} for row {row} (the items outside its "
                f"history that may be drawn, and the target), got {num_candidates}"
            )
        for draw in range(draws):
            random = np.random.default_rng([seed, draw, row])
            if log_counts is None:
                ranks = random.choice(left, num_candidates - 1, replace=False)
                # the item of a rank: the rank plus the number of barred items below it
                items[draw, row, 1:] = ranks + np.searchsorted(barred - np.arange(len(barred)), ranks, side="right")
            else:
                keys = log_counts + random.gumbel(size=num_items)  # the largest: a draw without replacement
                keys[barred] = -np.inf
                items[draw, row, 1:] = np.argpartition(-keys, num_candidates - 2)[: num_candidates - 1]
    return Candidates(items, "uniform" if counts is None else "popularity", seed, _hash_of_rows(rows))


def llara_candidates(rows: EvaluationRows, num_items: int, *, draws: int = 20, seed: int = 0) -> Candidates:
    """LLaRA's protocol: the target and 19 uniform items outside the newest 10 items of the history.

    Its published figure is HR@1 of one draw that is not stored.

    Source: Liao et al., SIGIR 2024 (LLaRA), section 4.1.
    """
    return draw_candidates(rows, num_items, _LLARA_CANDIDATES, draws=draws, seed=seed, shown=_LLARA_SHOWN)


@dataclass(frozen=True)
class DrawnValue(MetricValue):
    """A metric averaged over the draws of each row, then over rows; its standard error is that over rows."""

    draw_error: float  # standard error over the draws; NaN for one draw
    draw_deviation: float  # sample deviation of the figure of a single draw; NaN for one draw

    @classmethod
    def from_draws(cls, values: Tensor) -> DrawnValue:
        """From the values of all draws and rows, [D, B]."""
        over_rows = MetricValue.from_values(values.mean(dim=0))
        draws = values.shape[0]
        deviation = values.mean(dim=1).std().item() if draws > 1 else math.nan
        return cls(over_rows.mean, over_rows.standard_error, deviation / math.sqrt(draws), deviation)

    def to_dict(self) -> dict[str, float | None]:
        """As `MetricValue.to_dict`."""
        drawn = {"draw_error": or_none(self.draw_error), "draw_deviation": or_none(self.draw_deviation)}
        return super().to_dict() | drawn


@torch.no_grad()
def evaluate_candidates(
    scorer: Scorer,
    rows: EvaluationRows,
    candidates: Candidates,
    *,
    ks: Sequence[int] = (1, 5, 10, 20),
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> RankingMetrics:
    """Rank each row's target among its candidates, in every draw; ties count against the target.

    Names of the metrics end in `candidates.suffix`; their values are `DrawnValue`s.

    Args:
        candidates: drawn for these rows.
        ks: cut-offs; those of C and above, which every target reaches, are left out.
        scorer, rows, batch_size, device: as in `evaluate`.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"evaluate_candidates: ks must be at least 1, got {tuple(ks)}")
    candidates.check_rows(rows, scorer.num_items)
    drawn, start = torch.tensor(candidates.items), 0
    ranks = torch.empty(drawn.shape[:2], dtype=torch.int64)
    for found, targets in row_scores("evaluate_candidates", scorer, rows, batch_size, device):
        scores, stop = found.cpu(), start + len(targets)
        if bool(torch.isnan(scores).any()):
            raise ValueError(f"evaluate_candidates: scores must not be NaN, got NaN in rows from {start} on")
        chosen = scores.expand(len(drawn), -1, -1).gather(2, drawn[:, start:stop])  # the first is the target
        ranks[:, start:stop] = (chosen >= chosen[..., :1]).sum(dim=2)
        start = stop
    names = metric_names([k for k in ks if k < drawn.shape[2]])
    values = {name + candidates.suffix: DrawnValue.from_draws(rank_values(ranks, name)) for name in names}
    return RankingMetrics(values, ranks)
