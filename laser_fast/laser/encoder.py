"""Embeddings of users and catalogue without gradient: the item matrix, kept prefixes, parts within a budget."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from laser_fast.data.batches import BatchBuilder, PackedBatch
from laser_fast.data.sequences import PackedSequences
from laser_fast.laser.serving import Serving
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.weights_version import WeightsVersion
from laser_fast.models.device_batches import on_device
from laser_fast.models.network import LaserNetwork
from laser_fast.models.objective import LaserOutput, StepContext
from laser_fast.models.token_budget import TokenBudget
from laser_fast.nn.bituning import BiTuning
from laser_fast.nn.evaluation_mode import evaluating
from laser_fast.retrieval.prefix_store import PrefixStore, fetch_prefixes

Self = TypeVar("Self", bound="LaserEncoder")


class _ItemMatrix(nn.Module):
    """The item matrix V and the version of the weights it belongs to; always replaced as a whole."""

    values: Tensor

    def __init__(self, values: Tensor, made_at: int) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)
        self.made_at = made_at
        self.version = WeightsVersion(self, buffers=True)  # of writes in place


class LaserEncoder(LaserNetwork):
    """A network with its catalogue.

    The item matrix belongs to one version of the weights. Reading one of older weights is an error: no request encodes
    the catalogue on its own.

    Args:
        builder: texts, prompts and catalogue; turns histories into packed batches.
        item_ids: external ids in index order.
        lm, bituning, parts: the arguments of `LaserNetwork`.

    Attributes:
        serving: may compile the language model, or capture it in CUDA graphs, for requests.
        budget: limits the packed tokens that go through the language model at once.
        kept_prefixes: see `keep_prefixes`.
    """

    _items: _ItemMatrix

    def __init__(
        self, lm: FrozenLM, builder: BatchBuilder, item_ids: Sequence[str], bituning: BiTuning, **parts: Any
    ) -> None:
        super().__init__(lm, bituning, builder.num_items, **parts)
        if len(item_ids) != builder.num_items:
            raise ValueError(
                f"LaserModel: item_ids must name the {builder.num_items} items of the catalogue, got {len(item_ids)}"
            )
        self.builder = builder
        self.item_ids = list(item_ids)
        self.index_of_item = {item_id: index for index, item_id in enumerate(self.item_ids)}
        self.budget = TokenBudget()
        self.serving = Serving(lm, self.encode_users)
        self.kept_prefixes: PrefixStore | None = None
        self.item_matrix = torch.empty(0, lm.hidden_size)

    @property
    def item_matrix(self) -> Tensor:
        """V, float32 [I, d]; [0, d] until `refresh_items`. An assigned matrix belongs to the present weights."""
        return self._items.values

    @item_matrix.setter
    def item_matrix(self, values: Tensor) -> None:
        self._items = _ItemMatrix(values, self.weights.now())

    @property
    def items_are_outdated(self) -> bool:
        """Whether there is an item matrix of older weights, see `WeightsVersion`."""
        return len(self.item_matrix) > 0 and self._items.made_at != self.weights.now()

    def current_items(self) -> Tensor:
        """The item matrix V, float32 [I, d]; a RuntimeError if it is missing or of older weights."""
        items = self._any_items()
        if items.made_at != self.weights.now():
            if items is not self._items:  # another thread has just refreshed them
                return self.current_items()
            raise RuntimeError(
                "LaserModel: the item matrix must belong to the present weights, got one of older weights; call "
                "refresh_items() first, or keep_items() where only users were trained since"
            )
        return items.values

    def _any_items(self) -> _ItemMatrix:
        items = self._items
        if items.values.shape[0] != self.num_items:
            raise RuntimeError(
                f"LaserModel: the item matrix must hold {self.num_items} items, got {items.values.shape[0]}; "
                "call refresh_items() first"
            )
        return items

    def keep_items(self, item_matrix: Tensor | None = None) -> None:
        """Say that an item matrix belongs to the present weights.

        Args:
            item_matrix: float32 [I, d], made elsewhere; None = the one there is: only users were trained since.
        """
        self.item_matrix = self._any_items().values if item_matrix is None else item_matrix

    def encode_within(self, budget: TokenBudget) -> None:
        """Put no more packed tokens through the language model at once than the budget allows."""
        self.budget = budget

    def refresh_items(self, *, batch_size: int = 256, progress: bool = False) -> Tensor:
        """Encode the catalogue with the present parameters and keep it as the item matrix V: float32 [I, d].

        Requests use the matrix before it meanwhile, if that is current.
        """
        if self.text is not None:
            self.text.refresh_vectors()
        version = self.weights.now()  # weights that change meanwhile outdate the matrix
        matrix = self.encode_items(batch_size=batch_size, progress=progress).clone()  # leave inference mode
        self._items = _ItemMatrix(matrix, version)
        return matrix

    def forward(self, batch: PackedBatch, return_loss: bool = True, step: StepContext | None = None) -> LaserOutput:
        """`LaserNetwork.forward` with the item matrix of this model, unless the step has another."""

        def constant_of_the_epoch() -> Tensor:  # which a training step may use with newer weights
            return self._any_items().values if torch.is_grad_enabled() else self.current_items()

        step = step or StepContext()
        if step.item_matrix is None:
            step = replace(step, item_matrix=constant_of_the_epoch)
        return super().forward(batch, return_loss, step)

    @torch.inference_mode()
    def encode_users(self, histories: PackedSequences, *, batch_size: int = 128) -> Tensor:
        """Embeddings of users from histories of item indices: float32 [B, d], on the model's device."""
        starts = range(0, len(histories), batch_size)
        parts = (histories.select(np.arange(at, min(at + batch_size, len(histories)))) for at in starts)
        return self._encode_now(map(self.builder.histories, parts), self.kept_prefixes)

    @torch.inference_mode()
    def encode_items(
        self, indices: Sequence[int] | None = None, *, batch_size: int = 256, progress: bool = False
    ) -> Tensor:
        """Embeddings of items, by default of the whole catalogue: float32 [n, d], on the model's device."""
        wanted = np.arange(self.num_items) if indices is None else np.asarray(indices, dtype=np.int64)
        if self.item_side == "text" and self.text is not None:
            return self.text.embeddings()[torch.from_numpy(wanted).to(self.device)].float()
        starts = range(0, len(wanted), batch_size)
        shown = tqdm(starts, desc="encode items", unit="batch", disable=not progress, leave=False)
        return self._encode_now(self.builder.items(wanted[at : at + batch_size]) for at in shown)

    def _encode_now(self, batches: Iterable[PackedBatch], kept: PrefixStore | None = None) -> Tensor:
        """Encode within the budget and as in evaluation mode, without switching the mode."""
        if self.lm.model.training:
            raise RuntimeError(
                "LaserModel: the language model must be in evaluation mode to answer, got training; "
                "call lm.freeze() first"
            )

        def encode_part(part: PackedBatch) -> Tensor:
            part = on_device(part, self.device)
            if kept is None or not len(part):
                return self.encode(part)[0]
            with fetch_prefixes(kept, part, self.weights.now(), self.write_keys_and_values) as prefix:
                return self._encode_behind(part, None, prefix)

        with evaluating():
            rows = [self.budget.encode(batch, self.virtual_tokens, encode_part) for batch in batches]
        return torch.cat(rows) if rows else torch.empty(0, self.lm.hidden_size, device=self.device)

    def keep_prefixes(self, capacity: int) -> None:
        """Keep the prefixes of this many users, so that unchanged histories skip M-Former; 0 stops it.

        Any change of a weight empties the store. In a bidirectional language model a prefix of input embeddings sees
        the text and cannot be kept.
        """
        if capacity < 0:
            raise ValueError(f"keep_prefixes: capacity must not be negative, got {capacity}")
        if self.mformer is None and self.linear_prefix is None and self.bituning.prefix_tokens is None:
            raise ValueError("keep_prefixes: the model must have a prefix, got none")
        if self.deep_prefix is None and not self.lm.causal:
            raise ValueError(
                'keep_prefixes: prefix_mode must be "kv" for a bidirectional language model, got "embedding"'
            )
        self.kept_prefixes = PrefixStore(capacity) if capacity else None

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.kept_prefixes is not None:  # allocated on the old device
            self.kept_prefixes.clear()
        return self
