"""From settings to modules: the parts of a `LaserModel` around a frozen language model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from laser_fast.config import BiTuningConfig, ExecutionConfig, MFormerConfig, ModelConfig, PromptConfig, TextConfig
from laser_fast.data.batches import BatchBuilder
from laser_fast.data.items import ItemTable
from laser_fast.data.text import ItemText
from laser_fast.data.tokens import PromptLayout, Tokenizer, prompt_layout, tokenize_texts
from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.nn.bituning import BiTuning
from laser_fast.nn.deep_prefix import DeepPrefix
from laser_fast.nn.linear_prefix import LinearPrefix
from laser_fast.nn.mformer import MFormer
from laser_fast.nn.text_residual import TextResidual
from laser_fast.recommenders.protocol import SequentialRecommender


def build_execution(config: ExecutionConfig) -> Execution:
    """How the language model is to run its steps."""
    return Execution(
        checkpointing=config.checkpointing,
        fused=config.fused,
        share_dequantization=config.share_dequantization,
        last_layer=config.last_layer,
    )


def laser_parts(
    config: ModelConfig,
    lm: FrozenLM,
    builder: BatchBuilder,
    item_ids: Sequence[str],
    recommender: SequentialRecommender | None,
    counts: np.ndarray | None = None,
) -> dict[str, Any]:
    """Arguments of `LaserModel`: what is trained, around a frozen language model and a recommender.

    Its parameters are initialised from torch's global generator.

    Args:
        counts: int64 [I], events of each item in the training part; None = nobody counted.

    Raises:
        ValueError: the prefix is written from states, and there is no recommender that has any.
    """
    known = np.zeros(len(item_ids), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    bituning = BiTuning(
        lm.hidden_size,
        num_suffix_tokens=config.bituning.num_suffix_tokens,
        num_shared_prefix_tokens=config.mformer.num_queries if config.bituning.prefix == "shared" else 0,
        readout=read_out_of(config.bituning, lm),
        embedding_rms=lm.embedding_rms,
    )
    deep = config.bituning.prefix_mode == "kv"
    writer = _prefix_writer(config, lm, recommender)
    deep_prefix = None
    if deep:
        width, rms = (config.mformer.width, 1.0) if "mformer" in writer else (lm.hidden_size, lm.embedding_rms)
        deep_prefix = DeepPrefix(width, lm.layers, token_rms=rms)
    return {
        "lm": lm,
        "builder": builder,
        "item_ids": item_ids,
        "bituning": bituning,
        **writer,
        "deep_prefix": deep_prefix,
        "reuse_instruction": config.prompt.order == "prompt-first" and config.prompt.reuse_instruction,
        "head": config.bituning.head,
        "temperature": config.objective.temperature,
        "balance_weight": config.objective.balance_weight,
        "candidates": config.objective.candidates,
        "dropout": config.bituning.dropout,
        "text": build_text_residual(config.text, len(item_ids), lm.hidden_size),
        "item_side": "text" if config.text.items_are_texts else "lm",
        "mask_history": config.objective.mask_history,
        "item_counts": torch.from_numpy(known) if config.objective.popularity else None,
    }


def _prefix_writer(config: ModelConfig, lm: FrozenLM, recommender: SequentialRecommender | None) -> dict[str, Any]:
    """What writes the prefix from a recommender's states, and the recommender; nothing where it is not written so."""
    if not config.bituning.reads_states:
        return {}
    if recommender is None:
        raise ValueError(
            f'laser_parts: recommender must be given when bituning.prefix is "{config.bituning.prefix}", got None'
        )
    writer: dict[str, Any] = {"recommender": recommender}
    if config.bituning.prefix == "linear":
        tokens = config.mformer.num_queries
        linear = LinearPrefix(recommender.state_size, lm.hidden_size, num_tokens=tokens, rms=lm.embedding_rms)
        return writer | {"linear_prefix": linear}
    recompute, project = config.execution.checkpoint_mformer, config.bituning.prefix_mode == "embedding"
    mformer = build_mformer(config.mformer, recommender.state_size, lm, project=project, recompute=recompute)
    return writer | {"mformer": mformer}


def read_out_of(config: BiTuningConfig, lm: FrozenLM) -> str:
    """How the embedding is read out of this language model: "suffix" or "mean"."""
    if config.readout != "auto":
        return config.readout
    return "suffix" if lm.causal else "mean"


def build_text_residual(config: TextConfig, num_items: int, width: int) -> TextResidual | None:
    """The text residual without its vectors; None where it is off."""
    if not config.residual:
        return None
    return TextResidual(num_items, width, max_history=config.max_history, dropout=config.dropout)


def check_tokens(builder: BatchBuilder, lm: FrozenLM) -> None:
    """Refuse the tokens of another vocabulary than the language model's.

    Raises:
        ValueError: a token is beyond the table of embeddings.
    """
    layouts = (builder.user_layout, builder.item_layout)
    words = [token for layout in layouts for token in (*layout.left, *layout.right, *layout.separator)]
    largest = max([*words, int(builder.texts.input_ids.max(initial=0))])
    rows = lm.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"check_tokens: the tokenizer must give tokens below {rows}, the rows of the language model's embeddings, "
            f"got {largest}; use the tokenizer this model was trained with"
        )


def build_mformer(
    config: MFormerConfig, state_size: int, lm: FrozenLM, *, project: bool = True, recompute: bool = False
) -> MFormer:
    """M-Former for these states and this language model.

    Args:
        project: add the map to the language model's input embeddings.
        recompute: see `QFormer`.
    """
    return MFormer(
        state_size,
        lm.hidden_size if project else None,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_experts=config.num_experts,
        top_k=config.top_k,
        num_queries=config.num_queries,
        weighting=config.weighting,
        dropout=config.dropout,
        prefix_rms=lm.embedding_rms,
        recompute=recompute,
        dtype=config.dtype,
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
    """What turns histories into packed batches of this tokenizer's tokens.

    Args:
        known_items, max_history, text_history: see `BatchBuilder`.
    """
    texts = ItemText(prompt.item_template).render(items)

    def layout(template: str) -> PromptLayout:
        return prompt_layout(
            template,
            tokenizer,
            separator=prompt.separator,
            newest_first=prompt.newest_first,
            max_items=prompt.max_items,
            max_tokens=prompt.max_tokens,
        )

    return BatchBuilder(
        tokenize_texts(texts, tokenizer, prompt.max_item_tokens),
        layout(prompt.user_template),
        layout("{text}"),  # an item is a history of one without words around it
        known_items=known_items,
        max_history=max_history,
        prompt_first=prompt.order == "prompt-first",
        text_history=text_history,
    )


def build_model_batches(
    config: ModelConfig, items: ItemTable, tokenizer: Tokenizer, known_items: np.ndarray
) -> BatchBuilder:
    """`build_batches` with the limits that the parts of a model need."""
    return build_batches(
        config.prompt,
        items,
        tokenizer,
        known_items=known_items,
        max_history=config.mformer.max_history,
        text_history=config.text.max_history if config.text.residual else 0,
    )
