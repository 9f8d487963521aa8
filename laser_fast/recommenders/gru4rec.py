"""GRU4Rec (Hidasi et al. 2016, arXiv:1511.06939) on packed histories, with tied item embeddings and full softmax."""

from copy import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from laser_fast.nn.evaluation_mode import draws_dropout
from laser_fast.ops.segments import segment_positions
from laser_fast.recommenders.packed_recommender import PackedRecommender


class _GRU(nn.GRU):
    """An `nn.GRU` with dropout where `draws_dropout` says so."""

    def forward(self, *inputs: Any) -> Any:
        if not self.training or draws_dropout(self):
            return super().forward(*inputs)
        quiet = copy(self)  # shares the weights, which another thread may train
        quiet.training = False
        return nn.GRU.forward(quiet, *inputs)


class GRU4Rec(PackedRecommender):
    """Next-item logits `dense(gru(e_item)) @ E^T`.

    The paper has an output matrix of its own and samples negatives; here the item embeddings are the output matrix, as
    in later public implementations, and training sees the whole catalogue.
    """

    kind: ClassVar[str] = "gru4rec"

    def __init__(
        self,
        num_items: int,
        *,
        width: int = 64,
        hidden_width: int | None = None,
        num_layers: int = 1,
        max_length: int = 50,
        dropout: float = 0.3,
        state_dropout: float = 0.2,
        bias: bool = True,
    ) -> None:
        """Draw Glorot weights from torch's global generator.

        Args:
            width: of the item embeddings and the states.
            hidden_width: of the recurrent layers; None for 2 * `width`.
            dropout: of the embeddings and between recurrent layers.
            state_dropout: of the states before they meet the item embeddings.
            bias: of the recurrent layers.
        """
        hidden_width = 2 * width if hidden_width is None else hidden_width
        super().__init__(locals())
        self.dropout = dropout
        self.state_dropout = state_dropout
        self.item_embedding = nn.Embedding(num_items, width)
        between = dropout if num_layers > 1 else 0.0  # else torch warns
        self.gru = _GRU(width, hidden_width, num_layers, bias=bias, dropout=between)
        self.dense = nn.Linear(hidden_width, width)
        for parameter in self.parameters():
            (nn.init.xavier_normal_ if parameter.dim() == 2 else nn.init.zeros_)(parameter)

    def forward(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        embedded = F.dropout(self.item_embedding(items), self.dropout, draws_dropout(self))
        if items.numel():
            order, batch_sizes = _by_time(cu_seqlens, items.numel())
            output = self.gru(PackedSequence(embedded[order], batch_sizes))[0].data
            hidden = torch.empty_like(output).index_copy(0, order, output)
        else:
            hidden = embedded.new_zeros(0, self.gru.hidden_size)
        return F.dropout(self.dense(hidden), self.state_dropout, draws_dropout(self))


def _by_time(cu_seqlens: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Torch's order, all first items, then all second ones, longest history first: places int64 [N], group sizes."""
    lengths, positions = cu_seqlens.diff(), segment_positions(cu_seqlens, num_items)
    rank = lengths.argsort(descending=True, stable=True).argsort()  # 0 for the longest history
    key = positions * lengths.numel() + rank.repeat_interleave(lengths, output_size=num_items)
    return key.argsort(), torch.bincount(positions.cpu())
