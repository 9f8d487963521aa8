"""Batches of a training or scoring step: ids for the recommender and tokens for the language model, both packed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laser_fast.data.sequences import EvaluationRows, PackedSequences, row_indices
from laser_fast.data.tokens import PromptLayout, TokenizedTexts, history_tokens, prompt_lengths


@dataclass(frozen=True)
class PackedBatch:
    """B sequences, as the recommender and as the language model read them.

    Attributes:
        items, cu_seqlens: int64 [N] and int32 [B+1], history items (oldest first) whose states M-Former reads.
        input_ids, token_cu_seqlens: int64 [T] and int32 [B+1], prompts around the texts.
        instruction: tokens in front of the prefix of every sequence, which `input_ids` does not repeat; None = none.
        targets: int64 [B]; None where nothing is to be predicted.
        positives: the distinct targets and negatives as sequences, where these are encoded with gradient.
        positive_targets: int64 [B], which of `positives` is each user's target.
        negatives: int64 [B, n], items drawn for each user; None = none.
        negative_places: int64 [B, n], where they stand in `positives`; None without one of the two.
        folds: int64 [B], whose states of a cross-fitted recommender M-Former reads, -1 for those of the model that has
            seen all users; None = -1 for all rows.
        text_items, text_cu_seqlens: int64 [M] and int32 [B+1], history items (oldest first), known to the recommender
            or not, whose frozen text vectors are read; None where none are.
    """

    items: Tensor
    cu_seqlens: Tensor
    input_ids: Tensor
    token_cu_seqlens: Tensor
    instruction: tuple[int, ...] | None = None
    targets: Tensor | None = None
    positives: "PackedBatch | None" = None
    positive_targets: Tensor | None = None
    negatives: Tensor | None = None
    negative_places: Tensor | None = None
    folds: Tensor | None = None
    text_items: Tensor | None = None
    text_cu_seqlens: Tensor | None = None

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | PackedBatch)
        }
        return replace(self, **moved)

    @property
    def token_lengths(self) -> np.ndarray:
        """Tokens of every text, virtual ones not counted: int64 [B]."""
        return np.diff(self.token_cu_seqlens.cpu().numpy()).astype(np.int64)

    def select(self, rows: np.ndarray | Sequence[int]) -> "PackedBatch":
        """The rows `rows` (indices or a mask) as a batch of their own, in that order, on the same device.

        Of the positives, those that are targets or negatives of these rows come along.
        """
        index = row_indices(rows, len(self), "PackedBatch.select")
        chosen = torch.from_numpy(index).to(self.items.device)
        items, cu_seqlens = _select(self.items, self.cu_seqlens, index)
        input_ids, token_cu_seqlens = _select(self.input_ids, self.token_cu_seqlens, index)
        part = PackedBatch(items, cu_seqlens, input_ids, token_cu_seqlens, self.instruction)
        of_rows: dict[str, Any] = {
            name: value[chosen]
            for name in ("targets", "negatives", "folds")
            if (value := getattr(self, name)) is not None
        }
        if self.text_items is not None and self.text_cu_seqlens is not None:
            read = _select(self.text_items, self.text_cu_seqlens, index)
            of_rows |= dict(zip(("text_items", "text_cu_seqlens"), read, strict=True))
        if self.positives is not None:
            kept, found = np.unique(self.places[index], return_inverse=True)
            places = torch.from_numpy(found.reshape(len(index), -1)).to(chosen)
            of_rows |= {"positives": self.positives.select(kept), "positive_targets": places[:, 0].contiguous()}
            if self.negative_places is not None:
                of_rows["negative_places"] = places[:, 1:].contiguous()
        return replace(part, **of_rows)

    @property
    def places(self) -> np.ndarray:
        """Which of `positives` each row needs, its target first: int64 [B, 1 + n]; on the host."""
        assert self.positive_targets is not None
        places = [self.positive_targets[:, None]]
        if self.negative_places is not None:
            places.append(self.negative_places)
        return np.asarray(torch.cat(places, dim=1).cpu().numpy())


def _select(values: Tensor, cu_seqlens: Tensor, index: np.ndarray) -> tuple[Tensor, Tensor]:
    part = PackedSequences(values.cpu().numpy(), cu_seqlens.cpu().numpy()).select(index)
    return torch.from_numpy(part.items).to(values.device), torch.from_numpy(part.cu_seqlens).to(values.device)


@dataclass(frozen=True, eq=False)
class BatchBuilder:
    """Turns histories and items into packed batches, from texts that were tokenised before.

    Args:
        texts: tokens of every catalogue item.
        user_layout: prompt around a history.
        item_layout: prompt around a single item.
        known_items: bool [I], items that the ID-based recommender was trained on; states of others are left out.
        max_history: newest items whose states M-Former reads.
        prompt_first: the words before the items stand in front of the prefix, as the batch's `instruction`.
        text_history: newest items whose frozen text vectors are read; 0 = none are.
    """

    texts: TokenizedTexts
    user_layout: PromptLayout
    item_layout: PromptLayout
    known_items: np.ndarray
    max_history: int
    prompt_first: bool = False
    text_history: int = 0

    @property
    def num_items(self) -> int:
        """Size of the catalogue I."""
        return len(self.known_items)

    def histories(self, histories: PackedSequences) -> PackedBatch:
        """Batch of users, from their histories (oldest first)."""
        return self._build(histories, self.user_layout)

    def items(self, indices: np.ndarray) -> PackedBatch:
        """Batch of items, each a sequence of one."""
        return self._build(PackedSequences.singles(indices), self.item_layout)

    def training_batch(
        self, rows: EvaluationRows, *, with_positives: bool, negatives: np.ndarray | None = None
    ) -> PackedBatch:
        """Batch of B users with their targets.

        Args:
            with_positives: encode targets, and negatives, with gradient in the step.
            negatives: int64 [B, n], items drawn for every row (`NegativeSampler`); None = none.
        """
        wanted = rows.targets[:, None]
        if negatives is not None:
            wanted = np.concatenate([wanted, negatives], axis=1)
        batch = replace(
            self.histories(rows.histories),
            targets=torch.from_numpy(rows.targets),
            folds=None if rows.folds is None else torch.from_numpy(rows.folds),
            negatives=None if negatives is None else torch.from_numpy(wanted[:, 1:].astype(np.int64)),
        )
        if not with_positives:
            return batch
        distinct, found = np.unique(wanted, return_inverse=True)
        places = torch.from_numpy(found.reshape(wanted.shape))
        batch = replace(batch, positives=self.items(distinct), positive_targets=places[:, 0].contiguous())
        return batch if negatives is None else replace(batch, negative_places=places[:, 1:].contiguous())

    def item_batches(self, batch_size: int) -> Iterator[PackedBatch]:
        """The whole catalogue in index order."""
        for start in range(0, self.num_items, batch_size):
            yield self.items(np.arange(start, min(start + batch_size, self.num_items)))

    def user_lengths(self, histories: PackedSequences) -> np.ndarray:
        """Tokens of the text of every user in `histories`, virtual ones not counted: int64 [B]."""
        return prompt_lengths(histories, self.texts, self._inner(self.user_layout))

    def item_lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of the text of every item in `items`, virtual ones not counted: int64 [n]."""
        return prompt_lengths(PackedSequences.singles(indices), self.texts, self._inner(self.item_layout))

    def _inner(self, layout: PromptLayout) -> PromptLayout:
        """Without the instruction, where that stands in front of the prefix."""
        return replace(layout, left=[]) if self.prompt_first else layout

    def _build(self, sequences: PackedSequences, layout: PromptLayout) -> PackedBatch:
        packed = history_tokens(sequences, self.texts, self._inner(layout))
        seen = self._known(sequences).truncate_left(self.max_history)
        arrays = (seen.items, seen.cu_seqlens, *packed)
        items, cu_seqlens, input_ids, token_cu_seqlens = (torch.from_numpy(array) for array in arrays)
        instruction = tuple(layout.left) if self.prompt_first else None
        batch = PackedBatch(items, cu_seqlens, input_ids, token_cu_seqlens, instruction)
        if not self.text_history:
            return batch
        read = sequences.truncate_left(self.text_history)
        bounds = torch.from_numpy(read.cu_seqlens)
        return replace(batch, text_items=torch.from_numpy(read.items), text_cu_seqlens=bounds)

    def _known(self, sequences: PackedSequences) -> PackedSequences:
        known = self.known_items[sequences.items]
        if known.all():
            return sequences
        before = np.concatenate([[0], np.cumsum(known)])
        return PackedSequences(sequences.items[known], before[sequences.cu_seqlens].astype(np.int32))
