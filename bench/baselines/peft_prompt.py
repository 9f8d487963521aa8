"""Prompt tuning by peft: its trained prompt in front of a padded batch, the frozen model behind it, a suffix of ours.

It computes what `LaserModel` computes with a shared prefix in place of M-Former's.
"""

from __future__ import annotations

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from steps import gradients
from torch import Tensor
from transformers import PreTrainedModel

from baselines.padded_step import around_text, pad
from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.ops import catalog_cross_entropy


class PeftPromptStep:
    """Forward and backward of a batch of users.

    Args:
        model: with a shared prefix, whose values the prompt starts from; its suffix and item matrix are used.
        language_model: a `twin` of its frozen model.
        batch: users with targets.
    """

    def __init__(self, model: LaserModel, language_model: PreTrainedModel, batch: PackedBatch) -> None:
        assert model.bituning.prefix_tokens is not None
        tokens = model.bituning.prefix_tokens
        config = PromptTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=len(tokens))
        self.tuned = get_peft_model(language_model, config).to(tokens.device)
        prompt = self.tuned.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            prompt.copy_(tokens)
        self.model = model
        self.language_model = language_model
        self.batch = batch
        self.texts = pad(batch)
        self.parameters = [prompt, model.bituning.suffix_tokens]

    def encode(self) -> Tensor:
        """Embeddings of the users, float32 [B, d]."""
        embeds, mask, last = around_text(self.language_model, self.texts, self.model.bituning.suffix_tokens, None)
        hidden = self.tuned(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        rows = torch.arange(len(last), device=last.device)
        return hidden[rows, last + self.parameters[0].shape[0]].float()

    def __call__(self) -> tuple[Tensor | None, ...]:
        """Gradients of the prompt and the suffix."""
        assert self.batch.targets is not None
        matrix, temperature = self.model.item_matrix, self.model.temperature
        loss = catalog_cross_entropy(self.encode(), matrix, self.batch.targets, temperature=temperature)
        return gradients(loss, self.parameters)
