"""From settings to modules: the arguments of a `LaserModel` around a frozen language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from laser_fast.config import BiTuningConfig, ExecutionConfig, ModelConfig, PromptConfig
from laser_fast.data.batches import BatchBuilder
from laser_fast.data.items import ItemTable
from laser_fast.data.text import ItemText
from laser_fast.data.tokens import Tokenizer, prompt_layout, tokenize_texts
from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.language_model import LoadedBase
from laser_fast.models.objective import Objective
from laser_fast.models.text_scorers import CatalogueTexts
from laser_fast.nn.bituning import BiTuning
from laser_fast.nn.mformer import MFormer
from laser_fast.nn.prefixes import DeepPrefix, LinearPrefix
from laser_fast.nn.text_residual import TextResidual
from laser_fast.recommenders.protocol import SequentialRecommender


@dataclass(frozen=True, eq=False)
class Foundation:
    """What a model is built on."""

    config: ModelConfig
    base: LoadedBase
    items: ItemTable
    recommender: SequentialRecommender | None
    counts: np.ndarray  # int64 [I], training events of each item; 0 if unknown
    known_items: np.ndarray  # bool [I], the items whose states of the recommender are read


def build_execution(config: ExecutionConfig) -> Execution:
    """The settings of `FrozenLM`."""
    return Execution(**config.model_dump(exclude={"checkpoint_mformer"}))


def build_parts(foundation: Foundation) -> dict[str, Any]:
    """`laser_parts` around a loaded language model and a catalogue with texts.

    Raises:
        ValueError: tokens of another vocabulary, a template with an unknown field, or a missing recommender.
    """
    config, items, tokenizer = foundation.config, foundation.items, foundation.base.tokenizer
    lm = FrozenLM(foundation.base.model, build_execution(config.execution))
    text_history = config.text.max_history if config.text.residual else 0
    limits = {"max_history": config.mformer.max_history, "text_history": text_history}
    builder = build_batches(config.prompt, items, tokenizer, known_items=foundation.known_items, **limits)
    _check_tokens(builder, lm)
    parts = laser_parts(config, lm, builder, items.ids, foundation.recommender, foundation.counts)
    if config.text.residual:  # it reads the texts when it first needs them
        parts["text"].source = partial(_catalogue_texts(config, items, tokenizer).vectors, lm)
    return parts


def laser_parts(
    config: ModelConfig,
    lm: FrozenLM,
    builder: BatchBuilder,
    item_ids: Sequence[str],
    recommender: SequentialRecommender | None,
    counts: np.ndarray | None = None,
) -> dict[str, Any]:
    """Arguments of `LaserModel`; trained parameters are initialised from torch's global generator.

    Args:
        counts: int64 [I], training events of each item; None = all 0.
    """
    settings, width = config.bituning, lm.hidden_size
    objective = config.objective.model_dump(include={"temperature", "balance_weight", "candidates", "mask_history"})
    parts: dict[str, Any] = {"lm": lm, "builder": builder, "item_ids": item_ids}
    parts["bituning"] = BiTuning(
        width,
        num_suffix_tokens=settings.num_suffix_tokens,
        num_shared_prefix_tokens=config.mformer.num_queries if settings.prefix == "shared" else 0,
        readout=read_out_of(settings, lm),
        embedding_rms=lm.embedding_rms,
    )
    parts |= _prefix_writer(config, lm, recommender)
    if settings.prefix_mode == "kv":
        inner, rms = (config.mformer.width, 1.0) if "mformer" in parts else (width, lm.embedding_rms)
        parts["deep_prefix"] = DeepPrefix(inner, lm.layers, token_rms=rms)
    if config.text.residual:
        text = TextResidual(len(item_ids), width, max_history=config.text.max_history, dropout=config.text.dropout)
        parts |= {"text": text, "item_side": "text" if config.text.items_are_texts else "lm"}
    if config.objective.popularity:
        known = np.zeros(len(item_ids), dtype=np.int64) if counts is None else counts
        parts["item_counts"] = torch.from_numpy(known)
    return parts | {
        "reuse_instruction": config.prompt.order == "prompt-first" and config.prompt.reuse_instruction,
        "head": settings.head,
        "dropout": settings.dropout,
        "objective": Objective(**objective),
    }


def _prefix_writer(config: ModelConfig, lm: FrozenLM, recommender: SequentialRecommender | None) -> dict[str, Any]:
    """The module that writes the prefix from a recommender's states, and the recommender, where there are such."""
    if not config.bituning.reads_states:
        return {}
    if recommender is None:
        raise ValueError(
            f'laser_parts: recommender must be given when bituning.prefix is "{config.bituning.prefix}", got None'
        )
    if config.bituning.prefix == "linear":
        tokens, rms = config.mformer.num_queries, lm.embedding_rms
        linear = LinearPrefix(recommender.state_size, lm.hidden_size, num_tokens=tokens, rms=rms)
        return {"recommender": recommender, "linear_prefix": linear}
    mformer = MFormer(
        recommender.state_size,
        lm.hidden_size if config.bituning.prefix_mode == "embedding" else None,
        prefix_rms=lm.embedding_rms,
        recompute=config.execution.checkpoint_mformer,
        **config.mformer.model_dump(exclude={"max_history", "states", "initialize_from"}),
    )
    return {"recommender": recommender, "mformer": mformer}


def read_out_of(config: BiTuningConfig, lm: FrozenLM) -> str:
    """How the embedding is read out of a language model: "suffix" or "mean"."""
    if config.readout != "auto":
        return config.readout
    return "suffix" if lm.causal else "mean"


def _catalogue_texts(config: ModelConfig, items: ItemTable, tokenizer: Tokenizer) -> CatalogueTexts:
    """The wordings of `config.text`."""
    known, length = np.ones(len(items), dtype=bool), config.text.max_tokens
    settings = {"order": "prefix-first", "max_item_tokens": length, "max_tokens": length}
    builders = []
    for template in config.text.templates or [config.prompt.item_template]:
        prompt = config.prompt.model_copy(update={"item_template": template, **settings})
        builders.append(build_batches(prompt, items, tokenizer, known_items=known, max_history=1))
    return CatalogueTexts(builders)


def _check_tokens(builder: BatchBuilder, lm: FrozenLM) -> None:
    layouts = (builder.user_layout, builder.item_layout)
    words = [token for layout in layouts for token in (*layout.left, *layout.right, *layout.separator)]
    largest = max([*words, int(builder.texts.input_ids.max(initial=0))])
    rows = lm.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"build_parts: the tokenizer must give tokens below {rows}, the rows of the language model's embeddings, "
            f"got {largest}; use the tokenizer this model was trained with"
        )


def build_batches(
    prompt: PromptConfig,
    items: ItemTable,
    tokenizer: Tokenizer,
    *,
    known_items: np.ndarray,
    max_history: int,
    text_history: int = 0,
) -> BatchBuilder:
    """Turns histories into packed batches of this tokenizer's tokens; the last three arguments are `BatchBuilder`'s."""
    limits = prompt.model_dump(include={"separator", "newest_first", "max_items", "max_tokens"})
    return BatchBuilder(
        tokenize_texts(ItemText(prompt.item_template).render(items), tokenizer, prompt.max_item_tokens),
        prompt_layout(prompt.user_template, tokenizer, **limits),
        prompt_layout("{text}", tokenizer, **limits),  # an item is a history of one without words around it
        known_items=known_items,
        max_history=max_history,
        prompt_first=prompt.order == "prompt-first",
        text_history=text_history,
    )
