"""Prompt tuning by peft: its trained prompt in front of a padded batch, the frozen model behind it, a suffix of ours.

It computes what `LaserModel` computes with a shared prefix in place of M-Former's.
"""

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from baselines.padded_step import PaddedStep, around_text
from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel


class PeftPromptStep(PaddedStep):
    """A padded step whose trained parameters are peft's prompt and our suffix.

    Args:
        model: with a shared prefix, whose values the prompt starts from.
    """

    def __init__(self, model: LaserModel, language_model: PreTrainedModel, batch: PackedBatch) -> None:
        super().__init__(model, language_model, batch)
        tokens = model.bituning.prefix_tokens
        assert tokens is not None
        config = PromptTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=len(tokens))
        self.tuned = get_peft_model(language_model, config).to(tokens.device)
        prompt = self.tuned.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            prompt.copy_(tokens)
        self.parameters = [prompt, model.bituning.suffix_tokens]

    def encode(self) -> tuple[Tensor, None]:
        """Embeddings of the users, float32 [B, d]; nothing is routed."""
        embeds, mask, last = around_text(self.language_model, self.texts, self.model.bituning.suffix_tokens, None)
        hidden = self.tuned(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        rows = torch.arange(len(last), device=last.device)
        return hidden[rows, last + self.parameters[0].shape[0]].float(), None
