"""Vectors of the catalogue's texts from a frozen language model, computed when they are first needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.config import ModelConfig
from laser_fast.data.batches import BatchBuilder
from laser_fast.data.items import ItemTable
from laser_fast.data.tokens import Tokenizer
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.models.assembly import build_batches
from laser_fast.models.zero_shot import text_vectors
from laser_fast.nn.text_residual import centred

if TYPE_CHECKING:
    from laser_fast.laser.model import LaserModel


@dataclass(frozen=True, eq=False)
class CatalogueTexts:
    """The texts of all items in each of their wordings, tokenized.

    Attributes:
        builders: one for each wording.
    """

    builders: Sequence[BatchBuilder]

    @classmethod
    def build(cls, config: ModelConfig, items: ItemTable, tokenizer: Tokenizer) -> "CatalogueTexts":
        """The wordings that `config.text` asks for.

        Raises:
            ValueError: a template names a field that the items do not have.
        """
        text, known = config.text, np.ones(len(items), dtype=bool)
        limits = {"max_item_tokens": text.max_tokens, "max_tokens": text.max_tokens}
        prompts = [
            config.prompt.model_copy(update={"item_template": template, "order": "prefix-first", **limits})
            for template in text.templates or [config.prompt.item_template]
        ]
        return cls([build_batches(prompt, items, tokenizer, known_items=known, max_history=1) for prompt in prompts])

    def vectors(self, lm: FrozenLM, *, batch_size: int = 64) -> Tensor:
        """Mean of the unit vectors of all wordings, centred: float32 [I, D], unit rows, on the device of `lm`."""
        with torch.inference_mode():
            wordings = [text_vectors(lm, builder, batch_size=batch_size) for builder in self.builders]
            vectors = centred(F.normalize(torch.stack(wordings).sum(dim=0), dim=-1))
        return vectors.clone()


def read_texts(model: "LaserModel", config: ModelConfig, items: ItemTable, tokenizer: Tokenizer) -> None:
    """Let the text residual of a model, where it has one, read the catalogue's texts when it first needs them.

    Raises:
        ValueError: a template names a field that the items do not have.
    """
    if model.text is not None:
        model.text.source = partial(CatalogueTexts.build(config, items, tokenizer).vectors, model.lm)
        model.text.source_version = model.lm_weights.now
