"""Stage 1 aligns M-Former's queries with the text of the same history (after BLIP-2, section 3.1).

No language model runs: the text goes through the querying transformer's self-attention (`text_branch`), from the token
embeddings of the frozen language model through a linear map. The loss is a weighted sum of three terms:

    contrastive (ITC)   the queries of a user are closer to its text than to other texts, and the reverse
    matching (ITM)      queries that read a user and a text tell whether they belong together
    generation (ITG)    the text is predicted token by token from the keys and values of the queries

A user has the queries of k experts, which do not see each other. In matching and generation each of the k groups meets
the text alone, and the routing weights combine the answers as M-Former combines its queries. This costs k times the
text, but the first expert alone would leave the other experts and the router without a gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_fast.nn.mformer import MFormer, MFormerOutput
from laser_fast.nn.qformer import CrossBoundaries, initialize_like_bert
from laser_fast.nn.stage1.matching import matching_pairs, same_rows
from laser_fast.nn.stage1.text_branch import TextBranch, select_sequences
from laser_fast.ops.catalog_cross_entropy import catalog_cross_entropy
from laser_fast.ops.dispatch import combine_queries, dispatch_queries
from laser_fast.ops.precision import autocast_off, wide_dtype
from laser_fast.ops.segments import segment_ids

_PROJECTION_SIZE = 256  # width p of the space where queries and texts are compared
_LABEL_SMOOTHING = 0.1
_LOG_TEMPERATURE_BOUNDS = (math.log(0.01), math.log(0.5))

Gather = Callable[[Tensor], Tensor]
"""Rows [B, ...] of this process -> those of all, its own first, with gradient (`Processes.gather`)."""


@dataclass(frozen=True)
class TermWeights:
    """Weights of the terms; a term of weight 0 is neither computed nor built."""

    contrastive: float = 1.0
    matching: float = 1.0
    generation: float = 1.0

    def __post_init__(self) -> None:
        if not any(vars(self).values()) or min(vars(self).values()) < 0:
            raise ValueError(
                "TermWeights: weights must not be negative and one at least must be above 0, "
                f"got {', '.join(f'{name} {value}' for name, value in vars(self).items())}"
            )


@dataclass(frozen=True)
class Pairs:
    """The B histories of a batch as ids and as text; each text has at least one token."""

    items: Tensor  # int64 [N], the items whose states M-Former read
    cu_seqlens: Tensor  # int32 [B+1] over `items`
    input_ids: Tensor  # int64 [T], tokens of the texts
    token_embeds: Tensor  # [T, D_emb], their frozen embeddings
    token_cu_seqlens: Tensor  # int32 [B+1] over the tokens


@dataclass(frozen=True)
class Vocabulary:
    """The tokens among which generation chooses, e.g. those in the texts of a catalogue."""

    input_ids: Tensor  # int64 [V], ascending
    embeds: Tensor  # [V, D_emb], their frozen embeddings


class PretrainingHeads(nn.Module):
    """The terms of stage 1, and what they train beside M-Former; not saved with the recommender.

    Args:
        mformer: whose querying transformer and query experts are used and trained.
        embedding_size: D_emb, width of the token embeddings.
        max_tokens: longest text.
        vocabulary: for generation.
    """

    vocabulary_ids: Tensor
    vocabulary_embeds: Tensor

    def __init__(
        self,
        mformer: MFormer,
        embedding_size: int,
        *,
        max_tokens: int,
        weights: TermWeights,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        if weights.generation and vocabulary is None:
            raise ValueError("PretrainingHeads: vocabulary must be given where generation has a weight, got None")
        width, decodes = mformer.query_experts.shape[-1], weights.generation > 0
        self._mformer = [mformer]  # in a list: used here, not owned
        self.weights = weights
        self.text = TextBranch(mformer.qformer, width, embedding_size, max_tokens=max_tokens, decodes=decodes)
        if weights.contrastive:
            self.query_projection = nn.Linear(width, _PROJECTION_SIZE)
            self.text_projection = nn.Linear(width, _PROJECTION_SIZE)
            self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))  # as CLIP
            for module in (self.query_projection, self.text_projection):
                module.apply(initialize_like_bert)
        self.match = nn.Linear(width, 1).apply(initialize_like_bert) if weights.matching else None
        self.decoder: nn.Sequential | None = None
        if vocabulary is not None and decodes:
            # BERT's head, scored by products with the frozen embeddings: it has no vocabulary of weights
            layers = nn.Linear(width, embedding_size), nn.GELU(), nn.LayerNorm(embedding_size)
            self.decoder = nn.Sequential(*layers).apply(initialize_like_bert)
            self.register_buffer("vocabulary_ids", vocabulary.input_ids, persistent=False)
            self.register_buffer("vocabulary_embeds", vocabulary.embeds, persistent=False)

    def forward(self, written: MFormerOutput, pairs: Pairs, gather: Gather | None = None) -> dict[str, Tensor]:
        """The terms of a batch.

        Args:
            written: of the histories; generation needs its layer inputs.
            gather: of the contrastive term, whose negatives come from all processes; matching stays within this one.

        Returns:
            float32 [] each: "loss", the weighted sum, and the unweighted "contrastive", "matching",
            "matching_accuracy" and "generation" of the terms with a weight.
        """
        values: dict[str, Tensor] = {}
        with self._mformer[0].products(written.queries.device):
            similarity = None
            if self.weights.contrastive or self.match is not None:
                hidden = self.text.embed(pairs.token_embeds, pairs.token_cu_seqlens)
            if self.weights.contrastive:
                queries = F.normalize(self.query_projection(written.queries), dim=-1)
                text = self.text_features(hidden, pairs.token_cu_seqlens)
                similarity = pair_similarity(queries.detach(), text.detach()) / self.temperature.detach()
                values["contrastive"] = contrastive_loss(queries, text, self.temperature, gather)
            if self.match is not None:
                values["matching"], values["matching_accuracy"] = self._matching(written, pairs, hidden, similarity)
            if self.decoder is not None:
                values["generation"] = self._generation(written, pairs)
        weights = vars(self.weights)
        terms = [weights[name] * value for name, value in values.items() if name in weights]
        return {"loss": torch.stack(terms).sum(), **values}

    def text_features(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """First-token feature of each packed text: `TextBranch.embed` [T, D] -> unit vectors [B, p]."""
        first = self.text.alone(hidden, cu_seqlens).index_select(0, cu_seqlens[:-1].long())
        return F.normalize(self.text_projection(first), dim=-1)

    @property
    def temperature(self) -> Tensor:
        """The learned temperature, clamped to 0.01..0.5."""
        return self.log_temperature.clamp(*_LOG_TEMPERATURE_BOUNDS).exp()

    def _matching(
        self, written: MFormerOutput, pairs: Pairs, hidden: Tensor, similarity: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """ITM: loss and accuracy over the pairs, a third of them true; without a similarity negatives are uniform."""
        assert self.match is not None
        mformer, routing = self._mformer[0], written.routing
        same = same_rows(pairs.items, pairs.cu_seqlens) | same_rows(pairs.input_ids, pairs.token_cu_seqlens)
        if similarity is None:
            similarity = torch.zeros(same.shape, device=same.device)
        users, texts, true = matching_pairs(similarity, same)
        num_experts, num_queries = routing.expert.shape[1], mformer.query_experts.shape[1]
        experts = routing.expert.index_select(0, users).contiguous()
        queries = dispatch_queries(mformer.qformer.norm(mformer.query_experts), experts)
        queries = F.dropout(queries, mformer.qformer.dropout, self.training)
        rows, cu_seqlens = select_sequences(pairs.token_cu_seqlens, texts.repeat_interleave(num_experts))
        per_user = torch.bincount(users, minlength=same.shape[0]) * (num_experts * num_queries)
        boundaries = CrossBoundaries(pairs.cu_seqlens, per_user)
        answers = self.text.beside(hidden.index_select(0, rows), cu_seqlens, queries, written.projected, boundaries)
        combined = combine_queries(answers, routing.weight.index_select(0, users))
        logits = self.match(combined).mean(dim=(1, 2)).to(wide_dtype(combined))
        loss = F.binary_cross_entropy_with_logits(logits, true.to(logits.dtype))
        return loss, ((logits.detach() > 0) == true).to(logits.dtype).mean()

    def _generation(self, written: MFormerOutput, pairs: Pairs) -> Tensor:
        """ITG: mean over the tokens of each text, then over the texts: such means add up over processes."""
        assert self.decoder is not None
        batch_size, num_experts = written.routing.expert.shape
        cu_seqlens, total = pairs.token_cu_seqlens, pairs.input_ids.shape[0]
        hidden = self.text.embed(pairs.token_embeds, cu_seqlens, shifted=True)
        # copy j of all texts continues the j-th group of every user; the groups of a user lie side by side
        group = torch.arange(batch_size * num_experts, device=cu_seqlens.device, dtype=torch.int32)
        group = group.view(batch_size, num_experts).T.flatten()
        bounds = torch.cat([cu_seqlens[:1], *(cu_seqlens[1:] + copy * total for copy in range(num_experts))])
        answers = self.text.behind(hidden.repeat(num_experts, 1), bounds, written.layer_inputs, group)
        text = segment_ids(cu_seqlens, total)
        weight = written.routing.weight.index_select(0, text)
        combined = (answers.view(num_experts, total, -1) * weight.T[..., None].to(answers.dtype)).sum(dim=0)
        target = torch.searchsorted(self.vocabulary_ids, pairs.input_ids)
        losses = catalog_cross_entropy(
            self.decoder(combined), self.vocabulary_embeds, target, temperature=1.0, normalize=False, reduction="none"
        )
        return (losses / cu_seqlens.diff().index_select(0, text)).sum() / batch_size


def pair_similarity(queries: Tensor, text: Tensor) -> Tensor:
    """Largest cosine over a user's queries: unit vectors [B, Q, p] and [C, p] -> [B, C], at least float32."""
    wide = wide_dtype(queries, text)
    with autocast_off(queries.device):
        return torch.einsum("bqp,cp->bcq", queries.to(wide), text.to(wide)).amax(dim=-1)


def contrastive_loss(
    queries: Tensor, text: Tensor, temperature: Tensor | float, gather: Gather | None = None
) -> Tensor:
    """ITC in both directions: float32 [], a mean over the B rows of this process; 0 for an empty batch.

    Args:
        queries: [B, Q, p], unit vectors.
        text: [B, p], unit vectors; row b belongs to queries[b].
        gather: takes negatives from all processes; None for this one alone.
    """
    if queries.shape[0] == 0:
        return queries.sum() * 0.0
    all_queries, all_text = (queries, text) if gather is None else (gather(queries), gather(text))
    target = torch.arange(queries.shape[0], device=queries.device)
    forward = pair_similarity(queries, all_text) / temperature
    backward = forward.T if all_queries is queries else pair_similarity(all_queries, text).T / temperature
    losses = [F.cross_entropy(side, target, label_smoothing=_LABEL_SMOOTHING) for side in (forward, backward)]
    return (losses[0] + losses[1]) / 2
