"""From a configuration and files to modules: the only place that unpacks the one into the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from laser_fast.config import ExecutionConfig, LaserConfig, MFormerConfig, resolve_path
from laser_fast.data import ItemText, PromptLayout, SequenceDataset, Split, leave_one_out, prompt_layout, tokenize_texts
from laser_fast.data.batches import BatchBuilder
from laser_fast.models.language_model import load_language_model as load_language_model
from laser_fast.models.laser import LaserModel
from laser_fast.models.recommender import SequentialRecommender
from laser_fast.models.recommender_files import load_recommender
from laser_fast.nn.bituning import BiTuning
from laser_fast.nn.execution import Execution
from laser_fast.nn.frozen_lm import FrozenLM
from laser_fast.nn.mformer import MFormer
from laser_fast.nn.prefix_kv import DeepPrefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Inputs:
    """What a model is built on, read from the files a configuration names."""

    dataset: SequenceDataset
    split: Split
    recommender: SequentialRecommender | None


def load_inputs(config: LaserConfig) -> Inputs:
    """Read the data set and the recommender, and make sure that the recommender was trained on this very split.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: the recommender was trained on another split or catalogue.
    """
    dataset = SequenceDataset.load(resolve_path(config.data))
    split = leave_one_out(dataset)
    recommender = None
    if config.recommender is not None:
        recommender = load_recommender(resolve_path(config.recommender), expected_split_hash=split.hash)
    return Inputs(dataset, split, recommender)


def build_laser(config: LaserConfig, inputs: Inputs, model: "PreTrainedModel", tokenizer: Any) -> LaserModel:
    """Assemble a new `LaserModel`; its trained parameters are initialised from torch's global generator."""
    lm = FrozenLM(model, build_execution(config.execution))
    builder = build_batches(config, inputs, tokenizer)
    return assemble_laser(config, lm, builder, inputs.dataset.items.ids, inputs.recommender)


def build_execution(config: ExecutionConfig) -> Execution:
    """How the language model is to run its steps."""
    return Execution(
        checkpointing=config.checkpointing,
        fused=config.fused,
        share_dequantization=config.share_dequantization,
        last_layer=config.last_layer,
    )


def assemble_laser(
    config: LaserConfig,
    lm: FrozenLM,
    builder: BatchBuilder,
    item_ids: Sequence[str],
    recommender: SequentialRecommender | None,
) -> LaserModel:
    """What is trained, around a frozen language model and a recommender."""
    bituning = BiTuning(
        lm.hidden_size,
        num_suffix_tokens=config.bituning.num_suffix_tokens,
        num_shared_prefix_tokens=config.mformer.num_queries if config.bituning.prefix == "shared" else 0,
        readout=config.bituning.readout,
        embedding_rms=lm.embedding_rms,
    )
    deep = config.bituning.prefix_mode == "kv"
    uses_mformer = config.bituning.prefix == "mformer"
    mformer = None
    if uses_mformer:
        assert recommender is not None  # the configuration demands it
        recompute = config.execution.checkpoint_mformer
        mformer = build_mformer(config.mformer, recommender.state_size, lm, project=not deep, recompute=recompute)
    deep_prefix = None
    if deep:
        width, rms = (config.mformer.width, 1.0) if uses_mformer else (lm.hidden_size, lm.embedding_rms)
        deep_prefix = DeepPrefix(width, lm.layers, rank=config.bituning.deep_prefix_rank, token_rms=rms)
    return LaserModel(
        lm,
        builder,
        item_ids,
        bituning,
        mformer=mformer,
        recommender=recommender if uses_mformer else None,
        deep_prefix=deep_prefix,
        reuse_instruction=config.prompt.order == "prompt-first" and config.prompt.reuse_instruction,
        head=config.bituning.head,
        temperature=config.objective.temperature,
        balance_weight=config.objective.balance_weight,
        candidates=config.objective.candidates,
        dropout=config.bituning.dropout,
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
        cross_attention_freq=config.cross_attention_freq,
        num_experts=config.num_experts,
        top_k=config.top_k,
        num_queries=config.num_queries,
        weighting=config.weighting,
        dropout=config.dropout,
        prefix_rms=lm.embedding_rms,
        recompute=recompute,
    )


def training_counts(split: Split, num_items: int) -> np.ndarray:
    """How often each item occurs in the training part: int64 [I]."""
    counts: np.ndarray = np.bincount(split.train.items, minlength=num_items)
    return counts


def build_batches(config: LaserConfig, inputs: Inputs, tokenizer: Any) -> BatchBuilder:
    """What turns rows of the data into packed batches of this tokenizer's tokens."""
    prompt = config.prompt
    texts = ItemText(prompt.item_template).render(inputs.dataset.items)

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
        layout(prompt.item_prompt),  # an item is a history of one, with words of its own around it
        known_items=training_counts(inputs.split, inputs.dataset.num_items) > 0,
        max_history=config.mformer.max_history,
        prompt_first=prompt.order == "prompt-first",
    )
