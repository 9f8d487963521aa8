"""Encoding and ranking in several processes: each does a share of the rows, all get the results."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from laser_fast.recommenders.protocol import Scorer
from laser_fast.training.epochs import Run


def refresh_items(run: Run) -> Tensor:
    """Encode the catalogue with the current parameters, a share of it in every process: float32 [I, d], V of all."""
    model, processes, size = run.model, run.processes, 2 * run.config.evaluation.batch_size
    if processes.size == 1:
        return model.refresh_items(batch_size=size, progress=run.progress)
    own = processes.share(model.num_items)
    most = len(processes.share(model.num_items, 0))
    rows = []
    for start in tqdm(range(0, most, size), desc="encode items", unit="batch", disable=not run.progress, leave=False):
        run.interruption.poll()
        rows.append(model.encode_items(own[start : start + size].tolist(), batch_size=size))
    model.keep_items(torch.cat(processes.gather_parts(torch.cat(rows))))
    return model.item_matrix


class SharedScorer:
    """A scorer of which every process scores a share of the histories; all get all scores. Satisfies `Scorer`.

    Args:
        scorer: in every process the same.
        run: whose processes share; a signal to one of them stops all between two calls.
    """

    def __init__(self, scorer: Scorer, run: Run) -> None:
        self.scorer = scorer
        self.run = run

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return self.scorer.num_items

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`; to be called in all processes with the same histories."""
        self.run.interruption.poll()
        rows = self.run.processes.share(len(cu_seqlens) - 1)
        first, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 1)  # none: one, not given to anybody
        bounds = cu_seqlens[first : end + 1]
        own = self.scorer.score(items[int(bounds[0]) : int(bounds[-1])], bounds - bounds[0])
        return torch.cat(self.run.processes.gather_parts(own[: len(rows)]))


def separate_random_streams(run: Run) -> None:
    """Every process but the first draws from a stream of its own from here on; dropout of shares is independent."""
    if run.processes.rank:
        seeds = np.random.SeedSequence([run.config.training.seed, run.processes.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
