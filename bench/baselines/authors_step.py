"""The training step in the form of the Laser authors' code (their finetuning of the second stage), written anew.

What is theirs: texts padded on the left to the longest of their list, prefix and suffix concatenated around them with
the padding in between; M-Former once per choice, one choice after the other, queries picked in a Python loop,
attention with all its probabilities; the balance loss counted in a loop; the frozen model over the padded rows. Their
first finetuning encodes in one step, all with gradient, B users, the list of their B labels and, one list at a time,
every user's negatives (B + 2 forwards), and scores a user against its own label and negatives. Their later ones encode
the users alone and score them by a broadcast cosine in 32 bits against the item matrix.

What differs, always to their advantage: no `lm_head`, no tokenizer in the step, the item states looked up beforehand,
weights in the dtype they compute in. So that the numbers can be compared: pooling is over a user's items (theirs is
over the padded length), padding has no vote in the load and is not seen by the language model, positions count without
it, and the prefix is projected once after the choices are combined, as in the paper.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from steps import StepShape, user_batch
from torch import Tensor, nn
from transformers import PreTrainedModel

from baselines.dispatch_loop import combine_loop, dispatch_loop
from baselines.routing_loop import routing_loop
from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.nn.qformer import QFormer

NEGATIVES = 10  # for every user


class PaddedList(NamedTuple):
    """One list of texts, padded, as their loader hands it over.

    Attributes:
        input_ids: int64 [B, L], padded on the left.
        text_mask: bool [B, L].
        states: float32 [B, N, D_id], of the recommender, padded on the right.
        item_mask: int64 [B, N].
    """

    input_ids: Tensor
    text_mask: Tensor
    states: Tensor
    item_mask: Tensor


def padded_list(model: LaserModel, batch: PackedBatch) -> PaddedList:
    """Pad a packed batch and look up the states of its items."""
    assert model.recommender is not None
    device, lengths, items = batch.items.device, batch.token_cu_seqlens.diff(), batch.cu_seqlens.diff()
    longest = int(lengths.max())
    text_mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    input_ids = torch.zeros(text_mask.shape, dtype=torch.int64, device=device)
    input_ids[text_mask] = batch.input_ids
    known = model.recommender.states(batch.items, batch.cu_seqlens)
    item_mask = torch.arange(int(items.max()), device=device) < items[:, None]
    states = known.new_zeros(*item_mask.shape, known.shape[1])
    states[item_mask] = known
    return PaddedList(input_ids, text_mask, states, item_mask.long())


class AuthorsWorkload:
    """A batch in both forms: users, their labels, and negatives for every user."""

    def __init__(self, model: LaserModel, shape: StepShape) -> None:
        self.users = user_batch(model, shape, with_positives=True)
        assert self.users.targets is not None
        generator = torch.Generator().manual_seed(4)
        negatives = torch.randint(0, shape.items, (shape.users, NEGATIVES), generator=generator)
        items = torch.cat([self.users.targets.cpu()[:, None], negatives], dim=1)
        self.items = model.builder.items(items.flatten().numpy()).to(model.device)  # [B * 11]
        self.shape = (shape.users, 1 + NEGATIVES)
        lists = [model.builder.items(chosen.numpy()).to(model.device) for chosen in (items[:, 0], *negatives)]
        self.padded_users = padded_list(model, self.users)
        self.padded_labels, *self.padded_negatives = (padded_list(model, texts) for texts in lists)

    def same_loss(self, model: LaserModel) -> tuple[Tensor, Tensor]:
        """The authors' loss from two packed batches, users and items; and the balance losses of these two."""
        users, routing = model.encode(self.users)
        items, of_items = model.encode(self.items)
        assert routing is not None and of_items is not None
        scores = (
            F.cosine_similarity(users.unsqueeze(1), items.view(*self.shape, -1), dim=-1) / model.objective.temperature
        )
        cross_entropy = F.cross_entropy(scores, torch.zeros(len(users), dtype=torch.int64, device=users.device))
        return cross_entropy, routing.balance_loss + of_items.balance_loss

    def whole_loss(self, model: LaserModel) -> Tensor:
        """The same with the balance losses in it."""
        cross_entropy, balance_loss = self.same_loss(model)
        return cross_entropy + model.objective.balance_weight * balance_loss


class AuthorsStep:
    """Their step with the weights of a `LaserModel`.

    Args:
        model: whose M-Former, suffix, temperature and weight of the balance loss are used.
        language_model: a `twin` of its frozen model.
    """

    def __init__(self, model: LaserModel, language_model: PreTrainedModel) -> None:
        assert model.mformer is not None
        self.mformer = model.mformer
        self.suffix = model.bituning.suffix_tokens
        self.language_model = language_model
        self.temperature = model.objective.temperature
        self.balance_weight = model.objective.balance_weight
        # they keep one parameter an expert
        self.experts = nn.ParameterList(
            [nn.Parameter(slab.detach().clone()) for slab in self.mformer.query_experts.split(1)]
        )
        others = [p for p in self.mformer.parameters() if p is not self.mformer.query_experts]
        self.parameters = [*others, *self.experts, self.suffix]
        self.cosine = nn.CosineSimilarity(dim=-1)

    def write_prefix(self, texts: PaddedList) -> tuple[Tensor, Tensor]:
        """Prefix [B, Q, D_llm] and the balance loss of one list."""
        assert self.mformer.lm_projection is not None
        router = self.mformer.router
        projected = self.mformer.state_projection(texts.states)
        weight, _, balance_loss, expert = routing_loop(
            projected, router.weight, router.bias, texts.item_mask, router.top_k
        )
        answers = [
            query_pass(self.mformer.qformer, queries, projected, texts.item_mask)
            for queries in dispatch_loop(self.experts, expert)
        ]
        return self.mformer.lm_projection(combine_loop(answers, weight)), balance_loss

    def encode(self, texts: PaddedList) -> tuple[Tensor, Tensor]:
        """Embeddings of one list, float32 [B, d], and its balance loss."""
        prefix, balance_loss = self.write_prefix(texts)
        text = self.language_model.get_input_embeddings()(texts.input_ids)
        suffix = self.suffix.to(text.dtype).expand(len(text), -1, -1)
        embeds = torch.cat([text, suffix], dim=1)
        embeds = torch.cat([prefix.to(text.dtype), embeds], dim=1)
        ones = texts.text_mask.new_ones
        mask = torch.cat([ones(prefix.shape[:2]), texts.text_mask, ones(suffix.shape[:2])], dim=1).long()
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        output = self.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        return output.last_hidden_state[:, -1].float(), balance_loss

    def loss_against_lists(
        self, users: PaddedList, labels: PaddedList, negatives: Sequence[PaddedList]
    ) -> tuple[Tensor, Tensor]:
        """Their first finetuning: the cross-entropy of each user among its label and negatives, and all balance losses.

        Args:
            users, labels: B texts each.
            negatives: B lists, one a user, equally long.
        """
        user, balance_loss = self.encode(users)
        label, more = self.encode(labels)
        balance_loss = balance_loss + more
        encoded = []
        for texts in negatives:
            negative, more = self.encode(texts)
            encoded.append(negative)
            balance_loss = balance_loss + more
        candidates = torch.cat([label.unsqueeze(1), torch.stack(encoded)], dim=1)
        scores = self.cosine(user.unsqueeze(1), candidates) / self.temperature
        first = torch.zeros(len(user), dtype=torch.int64, device=user.device)
        return F.cross_entropy(scores, first), balance_loss

    def whole_against_lists(self, work: AuthorsWorkload) -> Tensor:
        """The same of a workload, with the balance losses in it."""
        cross_entropy, balance_loss = self.loss_against_lists(
            work.padded_users, work.padded_labels, work.padded_negatives
        )
        return cross_entropy + self.balance_weight * balance_loss

    def loss_against_matrix(self, users: PaddedList, matrix: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Their later finetunings: the cross-entropy of the users against the item matrix, and the balance loss."""
        user, balance_loss = self.encode(users)
        scores = self.cosine(user.unsqueeze(1), matrix) / self.temperature
        return F.cross_entropy(scores, targets), balance_loss


def query_pass(qformer: QFormer, queries: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """The querying transformer as BERT's code runs it: queries [B, Q, D] read padded states [B, N, D] -> [B, Q, D]."""
    hidden = qformer.norm(queries)
    bias = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(mask == 0, torch.finfo(hidden.dtype).min)
    for layer in qformer.layers:
        block = layer.self_attention
        query, key, value = block.qkv(hidden).chunk(3, dim=-1)
        hidden = block.norm(hidden + block.out(_attention(query, key, value, block.num_heads)))
        block = layer.cross_attention
        if block is not None:
            key, value = block.key_value(states).chunk(2, dim=-1)
            read = _attention(block.query(hidden), key, value, block.num_heads, bias[:, None, None])
            hidden = block.norm(hidden + block.out(read))
        hidden = layer.feed_forward(hidden)
    return hidden


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    query, key, value = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
