"""The language model's part of a step as Hugging Face runs it: padded batch, sdpa, whole causal mask.

Everything else is that of `LaserModel`: M-Former's prefix, the suffix, the loss against the item matrix. So the two
differ in nothing but how the frozen model is run. The model comes without its `lm_head`, and its linear layers may be
bitsandbytes' 4-bit ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from steps import (
    StepShape,
    build_laser,
    counted_tokens,
    gradients,
    language_model_tokens,
    trained_parameters,
    twin,
    user_batch,
)
from torch import Tensor
from transformers import PreTrainedModel

from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.ops import Routing, catalog_cross_entropy


class PaddedTexts(NamedTuple):
    """Token ids [B, L] padded on the right, and the lengths [B]; L leaves room for a suffix of one token."""

    input_ids: Tensor
    lengths: Tensor


def pad(batch: PackedBatch) -> PaddedTexts:
    """What a tokenizer gives with `padding=True`: to the longest of the batch."""
    lengths = batch.token_cu_seqlens.diff().long()
    seen = torch.arange(int(lengths.max()) + 1, device=lengths.device) < lengths[:, None]
    input_ids = torch.zeros(seen.shape, dtype=torch.int64, device=lengths.device)
    input_ids[seen] = batch.input_ids
    return PaddedTexts(input_ids, lengths)


def with_checkpointing(language_model: PreTrainedModel) -> PreTrainedModel:
    """Hugging Face's gradient checkpointing, every layer from its input; it acts in training mode only."""
    language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return language_model.train()


class PaddedStep:
    """Forward and backward of a batch of users with targets, padded once, as a loader would.

    Args:
        model: whose trained parameters, recommender, loss and item matrix are used.
        language_model: a `twin` of its frozen model.
    """

    def __init__(self, model: LaserModel, language_model: PreTrainedModel, batch: PackedBatch) -> None:
        self.model, self.language_model, self.batch = model, language_model, batch
        self.texts = pad(batch)
        self.parameters = trained_parameters(model)

    def encode(self) -> tuple[Tensor, Routing | None]:
        """Embeddings of the users, float32 [B, d], and the routing of their prefixes."""
        prefix, _, routing = self.model.write_prefix(self.batch)
        embeds, mask, last = around_text(self.language_model, self.texts, self.model.bituning.suffix_tokens, prefix)
        hidden = self.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return hidden[torch.arange(len(last), device=last.device), last].float(), routing

    def __call__(self) -> tuple[Tensor | None, ...]:
        """Gradients of the step."""
        users, routing = self.encode()
        assert self.batch.targets is not None
        matrix, temperature = self.model.item_matrix, self.model.objective.temperature
        loss = catalog_cross_entropy(users, matrix, self.batch.targets, temperature=temperature)
        if routing is not None:
            loss = loss + self.model.objective.balance_weight * routing.balance_loss
        return gradients(loss, self.parameters)


class PaddedForms(NamedTuple):
    """A model and its batch, padded forms by name, and the tokens of ours and of a padded form."""

    model: LaserModel
    batch: PackedBatch
    forms: dict[str, PaddedStep]
    useful: int
    computed: int


def padded_forms(
    form: type[PaddedStep],
    frozen: PreTrainedModel,
    shape: StepShape,
    names: tuple[str, str],
    check: Callable[[str, Tensor, Tensor], None],
    *,
    prefix: str = "mformer",
) -> PaddedForms:
    """A padded form plain and with checkpointing, over the weights and the batch of ours.

    Args:
        check: is given the name, the embeddings of the form and those of ours.
    """
    plain, checkpointed = twin(frozen), with_checkpointing(twin(frozen))
    model = build_laser(frozen, shape, prefix=prefix)
    batch = user_batch(model, shape, with_positives=False)
    forms = dict(zip(names, (form(model, plain, batch), form(model, checkpointed, batch)), strict=True))
    with counted_tokens(plain) as counts:
        expected = model.encode(batch)[0]
        for name, padded in forms.items():
            check(name, padded.encode()[0], expected)
    return PaddedForms(model, batch, forms, language_model_tokens(model, batch), sum(counts))


def around_text(
    language_model: PreTrainedModel, texts: PaddedTexts, suffix: Tensor, prefix: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[prefix; text; suffix; padding] as `inputs_embeds` [B, Q + L, D], the mask, and where each suffix is."""
    embeds = language_model.get_input_embeddings()(texts.input_ids)
    places = torch.arange(embeds.shape[1], device=embeds.device)
    embeds = torch.where((places == texts.lengths[:, None])[..., None], suffix.to(embeds.dtype), embeds)
    mask, last = (places <= texts.lengths[:, None]).long(), texts.lengths
    if prefix is not None:
        embeds = torch.cat([prefix.to(embeds.dtype), embeds], dim=1)
        mask, last = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1), last + prefix.shape[1]
    return embeds, mask, last
