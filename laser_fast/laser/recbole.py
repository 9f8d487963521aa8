"""Laser behind the interface of RecBole's sequential recommenders, for its data and trainers; imports no RecBole."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laser_fast.data.sequences import EvaluationRows, PackedSequences, cu_seqlens_of
from laser_fast.laser.model import LaserModel
from laser_fast.recommenders.protocol import Scorer
from laser_fast.retrieval.inner_product import packed_tensors


class RecBoleLaser(nn.Module):
    """`calculate_loss`, `predict` and `full_sort_predict` of RecBole (1.2) over a `LaserModel`.

    RecBole counts items from 1 and pads with 0; external ids map its indices to the model's. An interaction is a
    mapping from field names to tensors. Evaluation and saving refresh an outdated item matrix.

    Args:
        model: to train by cross-entropy over the catalogue, call its `refresh_items()` at the start of every epoch.
        item_tokens: external id of every index of RecBole (`dataset.field2id_token["item_id"]`); the first one is the
            padding.
        with_positives: see `BatchBuilder.training_batch`.
    """

    def __init__(self, model: LaserModel, item_tokens: Sequence[str], *, with_positives: bool = True) -> None:
        super().__init__()
        for token in item_tokens[1:]:
            if token not in model.index_of_item:
                raise ValueError(f"RecBoleLaser: item_tokens must be items of the catalogue, got {token!r}")
        self.model = model
        self.n_items = len(item_tokens)
        self.ITEM_ID = self.POS_ITEM_ID = "item_id"  # RecBole's default names, to be set where its own differ
        self.ITEM_SEQ, self.ITEM_SEQ_LEN = "item_id_list", "item_length"
        self.with_positives = with_positives
        self._index = np.array([-1, *(model.index_of_item[token] for token in item_tokens[1:])], dtype=np.int64)

    def calculate_loss(self, interaction: Mapping[str, Tensor]) -> Tensor:
        """Training loss of a batch: float32 []."""
        targets = self._indices(interaction[self.POS_ITEM_ID])
        rows = EvaluationRows(np.zeros(len(targets), dtype=np.int64), self._histories(interaction), targets)
        loss: Tensor = self.model(self.model.builder.training_batch(rows, with_positives=self.with_positives)).loss
        return loss

    def full_sort_predict(self, interaction: Mapping[str, Tensor]) -> Tensor:
        """Score of every item of RecBole for every user: float32 [B, n_items], -inf for the padding."""
        self._refresh_outdated()
        histories = self._histories(interaction)
        scorer: Scorer = self.model.calibration or self.model
        scores = scorer.score(*packed_tensors(histories, self.model.device))
        padding = scores.new_full((len(histories), 1), -torch.inf)
        return torch.cat([padding, scores[:, torch.from_numpy(self._index[1:]).to(scores.device)]], dim=1)

    def predict(self, interaction: Mapping[str, Tensor]) -> Tensor:
        """Score of the item in each row: float32 [B]."""
        scores = self.full_sort_predict(interaction)
        return scores.gather(1, interaction[self.ITEM_ID].to(scores.device)[:, None])[:, 0]

    def forward(self, interaction: Mapping[str, Tensor]) -> Tensor:
        """`calculate_loss`."""
        return self.calculate_loss(interaction)

    def other_parameter(self) -> dict[str, Any]:
        """The item matrix, which RecBole keeps beside `state_dict`."""
        self._refresh_outdated()
        return {"item_matrix": self.model.item_matrix}

    def load_other_parameter(self, parameters: Mapping[str, Any] | None) -> None:
        """Take back the result of `other_parameter`."""
        if parameters:
            self.model.item_matrix = parameters["item_matrix"].to(self.model.device)

    def _refresh_outdated(self) -> None:
        if self.model.items_are_outdated:
            self.model.refresh_items()

    def _indices(self, items: Tensor) -> np.ndarray:
        """The model's indices of RecBole's."""
        values = items.cpu().numpy().astype(np.int64)
        if values.size and (values.min() < 1 or values.max() >= self.n_items):
            worst = values.min() if values.min() < 1 else values.max()
            raise ValueError(f"RecBoleLaser: items must lie in 1..{self.n_items - 1}, got {worst}")
        indices: np.ndarray = self._index[values]
        return indices

    def _histories(self, interaction: Mapping[str, Tensor]) -> PackedSequences:
        padded, lengths = interaction[self.ITEM_SEQ].cpu(), interaction[self.ITEM_SEQ_LEN].cpu()
        filled = torch.arange(padded.shape[1])[None] < lengths[:, None]
        return PackedSequences(self._indices(padded[filled]), cu_seqlens_of(lengths.numpy().astype(np.int64)))
