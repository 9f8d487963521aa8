"""The loss of stage 2: cross-entropy of each user's target among its candidates, by cosine over a temperature."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.data.batches import PackedBatch
from laser_fast.nn.mformer import balance_across
from laser_fast.ops import Routing, catalog_cross_entropy
from laser_fast.ops.catalog import unit_rows
from laser_fast.ops.host_copies import on_host, to_device
from laser_fast.ops.precision import autocast_off, wide_dtype
from laser_fast.ops.segments import segment_ids
from laser_fast.processes import ALONE, Processes


class LaserOutput(NamedTuple):
    """What a training forward gives, in float32; other training loops look for the loss in the first place."""

    loss: Tensor  # [], see `Objective`
    cross_entropy: Tensor  # [], against the item matrix or the sampled candidates
    balance_loss: Tensor  # []; 0 without M-Former
    load: Tensor | None  # [E], share of the items' choices of each expert; None without M-Former


@dataclass(frozen=True, eq=False)
class StepContext:
    """What a loss depends on beside its batch.

    Attributes:
        processes: those whose live candidates compete.
        balance_processes: those whose load is balanced together.
        items_train: compute items that the text residual alone makes in the step, with gradient, instead of using V.
        item_matrix: gives V [I, d]; called only where V takes part.
        popularity: p [] and log(1 + count) [I], of the network; adds p log(1 + count_i) to the scores over V.
    """

    processes: Processes = ALONE
    balance_processes: Processes = ALONE
    items_train: bool = True
    item_matrix: Callable[[], Tensor] | None = None
    popularity: tuple[Tensor, Tensor] | None = None

    def matrix(self) -> Tensor:
        """V; a RuntimeError where the step has none."""
        if self.item_matrix is None:
            raise RuntimeError("StepContext: item_matrix must give the vectors of the catalogue, got None")
        return self.item_matrix()


@dataclass(frozen=True)
class Objective:
    """The loss of stage 2.

        loss = CE(users, V) + CE(users, live) + alpha * L_balance            candidates "catalog"
        loss = CE(users, target and own negatives) + alpha * L_balance       candidates "sampled"

    V is the item matrix, a constant of the epoch. Live candidates are the distinct positives and negatives of the
    batch, where it has its positives, encoded in the step with gradient; those of all processes compete, each item
    once. "sampled" is the form of the Laser authors.

    Live candidates compete only with each other. In place of their rows of V they would be the only fresh rows among
    stale ones, and to tell fresh from stale is easier than to recommend: on MovieLens-100K the cross-entropy over 1,682
    items fell below 4 within 32 steps, to the log of the batch's 60 positives, while validation hardly moved.
    """

    temperature: float = 0.05  # tau
    balance_weight: float = 0.01  # alpha
    candidates: str = "catalog"  # or "sampled"
    mask_history: bool = False  # leave the other items of a user's history out of V

    def __post_init__(self) -> None:
        if self.candidates not in ("catalog", "sampled"):
            raise ValueError(f'Objective: candidates must be "catalog" or "sampled", got {self.candidates!r}')

    def __call__(
        self, batch: PackedBatch, users: Tensor, live: Tensor | None, routing: Routing | None, step: StepContext
    ) -> LaserOutput:
        """Loss of a batch with targets, from its users [B, d] and its live candidates [P, d], if any."""
        assert batch.targets is not None
        if self.candidates == "sampled":
            loss = cross_entropy = self._among_own(batch, users, live, step)
        else:
            ignored = history_pairs(batch) if self.mask_history else None
            loss = cross_entropy = whole_catalog_loss(
                users, step.matrix(), batch.targets, self.temperature, ignored=ignored, popularity=step.popularity
            )
            if live is not None:
                items, places = gather_candidates(live, batch, step.processes)
                loss = loss + catalog_cross_entropy(users, items, places, temperature=self.temperature)
        if routing is None:
            return LaserOutput(loss, cross_entropy.detach(), torch.zeros_like(cross_entropy), None)
        balance_loss, load = balance_across(routing, batch.cu_seqlens, step.balance_processes)
        loss = loss + self.balance_weight * balance_loss
        return LaserOutput(loss, cross_entropy.detach(), balance_loss.detach(), load.detach())

    def _among_own(self, batch: PackedBatch, users: Tensor, live: Tensor | None, step: StepContext) -> Tensor:
        """Against each user's target and negatives: live ones, else rows of V."""
        if batch.negatives is None:
            raise ValueError(
                "Objective: a batch must have negatives where candidates are sampled, got None; build it with "
                "training_batch"
            )
        assert batch.targets is not None
        if live is not None:
            assert batch.positive_targets is not None and batch.negative_places is not None
            places = torch.cat([batch.positive_targets[:, None], batch.negative_places], dim=1)
            return sampled_cross_entropy(users, live, places, self.temperature)
        wanted = torch.cat([on_host(batch.targets)[:, None], on_host(batch.negatives)], dim=1)
        distinct, places = (to_device(one, users.device) for one in torch.unique(wanted, return_inverse=True))
        return sampled_cross_entropy(users, step.matrix().index_select(0, distinct), places, self.temperature)


def whole_catalog_loss(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    ignored: tuple[Tensor, Tensor] | None = None,
    popularity: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Cross-entropy against the catalogue by cos / temperature + p log(1 + count), a mean over users.

    Args:
        users, items, targets, ignored: see `catalog_cross_entropy`.
        popularity: p float32 [] and log(1 + count) float32 [I]; None = p is 0.
    """
    if popularity is None:
        return catalog_cross_entropy(users, items, targets, temperature=temperature, ignored=ignored)
    weight, log_counts = popularity  # one more coordinate on both sides, so that no scores [B, I] are held
    users = torch.cat([unit_rows(users.float()) / temperature, weight.expand(len(users), 1)], dim=1)
    items = torch.cat([unit_rows(items.float()), log_counts[:, None]], dim=1)
    return catalog_cross_entropy(users, items, targets, temperature=1.0, normalize=False, ignored=ignored)


def history_pairs(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Rows and items of the histories of a batch, int64 [N] both."""
    items, bounds = batch.items, batch.cu_seqlens
    if batch.text_items is not None and batch.text_cu_seqlens is not None:  # has those unknown to the recommender too
        items, bounds = batch.text_items, batch.text_cu_seqlens
    return segment_ids(bounds, items.shape[0]), items


def gather_candidates(live: Tensor, batch: PackedBatch, processes: Processes) -> tuple[Tensor, Tensor]:
    """Live candidates of all processes, each item once, and the place of each target of this process among them.

    The copies of an item that several processes encoded are equal without dropout, and the sum of their gradients is
    the same whichever is taken: here that of this process, else of the lowest rank.

    Args:
        live: [P, d], embeddings of `batch.positives`.

    Returns:
        [P', d], in the order of the items (of a single process: `live`); int64 [B].
    """
    assert batch.targets is not None and batch.positive_targets is not None
    if processes.size == 1:
        return live, batch.positive_targets
    own = torch.empty(len(live), dtype=torch.int64, device=live.device)
    own[batch.positive_targets] = batch.targets
    if batch.negatives is not None and batch.negative_places is not None:
        own[batch.negative_places] = batch.negatives
    items, rows = processes.gather(own), processes.gather(live)
    distinct, places = torch.unique(items, return_inverse=True)
    number = torch.arange(len(items), device=items.device)
    first = torch.full_like(distinct, len(items)).scatter_reduce(0, places, number, "amin")
    return rows.index_select(0, first), places[: len(own)][batch.positive_targets]


def sampled_cross_entropy(users: Tensor, rows: Tensor, places: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each user's target among its own candidates, by cosine over `temperature`; a mean over users.

    Args:
        users: [B, d].
        rows: [P, d], distinct candidates of all users.
        places: int64 [B, 1 + n], the rows of a user's candidates, its target first, none twice.

    Returns:
        float32 [] (float64 for float64), accumulated in that type.
    """
    wide = wide_dtype(users, rows)
    with autocast_off(users.device):
        # all scores, those of others masked: to gather rows per user would sum gradients in no fixed order on a GPU
        scores = F.normalize(users.to(wide), dim=-1) @ F.normalize(rows.to(wide), dim=-1).T / temperature
        others = torch.ones_like(scores, dtype=torch.bool).scatter_(1, places, False)
        return F.cross_entropy(scores.masked_fill(others, -torch.inf), places[:, 0])
