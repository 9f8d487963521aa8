"""Stage 1: M-Former learns to say in its queries what the text of the same history says (after BLIP-2, section 3.1).

No language model runs: the text goes through the querying transformer's own self-attention, with token embeddings
    taken from
the frozen language model's table through a linear map. Of BLIP-2's three terms, the contrastive one (ITC) is here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_fast.nn.attention import AttentionPlan
from laser_fast.nn.qformer import FeedForward, QFormer, QFormerLayer, initialize_like_bert

_LOG_TEMPERATURE_BOUNDS = (math.log(0.01), math.log(0.5))


class ContrastiveHeads(nn.Module):
    """The text branch of the querying transformer and projections into the space where queries and texts are compared.

    Needed in stage 1 only, so it is no part of the recommender that is saved.

    Args:
        qformer: shared with M-Former; its self-attention is trained through both.
        width: D of the querying transformer.
        embedding_size: width of the token embeddings handed in.
        max_tokens: longest text.
        projection_size: of the comparison space.
    """

    def __init__(
        self,
        qformer: QFormer,
        width: int,
        embedding_size: int,
        *,
        max_tokens: int,
        projection_size: int = 256,
        temperature: float = 0.07,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self._qformer = [qformer]  # in a list: used here, owned and registered by M-Former
        self.label_smoothing = label_smoothing
        self.token_projection = nn.Linear(embedding_size, width)
        self.positions = nn.Parameter(torch.randn(max_tokens, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.feed_forwards = nn.ModuleList(FeedForward(width, qformer.dropout) for _ in qformer.layers)
        self.query_projection = nn.Linear(width, projection_size)
        self.text_projection = nn.Linear(width, projection_size)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        for module in (self.feed_forwards, self.query_projection, self.text_projection, self.token_projection):
            module.apply(initialize_like_bert)

    def encode_text(self, token_embeds: Tensor, cu_seqlens: Tensor) -> Tensor:
        """First-token feature of each packed text: token_embeds [T, D_emb] -> unit vectors [B, projection]."""
        lengths = cu_seqlens.diff().long()
        starts = cu_seqlens[:-1].long()
        position = torch.arange(token_embeds.shape[0], device=token_embeds.device)
        position = position - starts.repeat_interleave(lengths, output_size=token_embeds.shape[0])
        hidden = self.norm(self.token_projection(token_embeds) + self.positions.index_select(0, position))
        plan = AttentionPlan(cu_seqlens, causal=False)
        for layer, feed_forward in zip(self._qformer[0].layers, self.feed_forwards, strict=True):
            assert isinstance(layer, QFormerLayer)
            hidden = feed_forward(layer.self_attention.forward_packed(hidden, cu_seqlens, plan))
        return F.normalize(self.text_projection(hidden.index_select(0, starts)), dim=-1)

    def forward(self, queries: Tensor, token_embeds: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Contrastive loss of a batch.

        Args:
            queries: [B, Q, D], M-Former's combined queries.
            token_embeds: [T, D_emb], frozen token embeddings of the texts of the same histories.
            cu_seqlens: int32 [B+1] over the texts; every text has at least one token.

        Returns:
            float32 []: cross-entropy with label smoothing in both directions, in-batch negatives.
        """
        projected = F.normalize(self.query_projection(queries), dim=-1)
        text = self.encode_text(token_embeds, cu_seqlens)
        return contrastive_loss(projected, text, self.temperature, self.label_smoothing)

    @property
    def temperature(self) -> Tensor:
        """Learned, kept between 0.01 and 0.5."""
        return self.log_temperature.clamp(*_LOG_TEMPERATURE_BOUNDS).exp()


def contrastive_loss(queries: Tensor, text: Tensor, temperature: Tensor | float, label_smoothing: float) -> Tensor:
    """ITC: similarity of a pair = the largest over the Q queries; both directions.

    Args:
        queries: [B, Q, p], unit vectors.
        text: [B, p], unit vectors; row b belongs to queries[b].

    Returns:
        float32 []; 0 for an empty batch.
    """
    if queries.shape[0] == 0:
        return queries.sum() * 0.0
    similarity = torch.einsum("bqp,cp->bcq", queries.float(), text.float()).amax(dim=-1) / temperature
    target = torch.arange(similarity.shape[0], device=similarity.device)
    forward = F.cross_entropy(similarity, target, label_smoothing=label_smoothing)
    backward = F.cross_entropy(similarity.T, target, label_smoothing=label_smoothing)
    return (forward + backward) / 2
