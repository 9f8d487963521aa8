"""What a memory plan needs to know about the data of a configuration."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laser_fast.config import LaserConfig
from laser_fast.data import training_rows
from laser_fast.laser.build import load_inputs, training_counts
from laser_fast.lm.loading.language_model import load_tokenizer
from laser_fast.models.assembly import build_batches

_SAMPLE_ROWS = 512


@dataclass(frozen=True)
class Workload:
    """Sizes, and means over rows without virtual tokens."""

    num_items: int
    user_tokens: float
    item_tokens: float
    history: float  # items of a user that M-Former reads
    state_size: int = 64
    measured: bool = False  # from data; else upper bounds from the configuration

    @staticmethod
    def assumed(config: LaserConfig) -> "Workload":
        """100,000 items and the longest texts that the configuration allows."""
        return Workload(100_000, config.prompt.max_tokens, config.prompt.max_item_tokens, config.mformer.max_history)


def workload_of(config: LaserConfig) -> Workload:
    """Mean lengths, in tokens, over up to 512 training rows; `Workload.assumed` without data or tokenizer."""
    without_tokenizer = config.lm.tokenizer is None and config.lm.path.startswith("random:")
    if without_tokenizer or not Path(config.data).exists():
        return Workload.assumed(config)
    has_recommender = config.recommender is not None and Path(config.recommender).exists()
    inputs = load_inputs(config if has_recommender else config.model_copy(update={"recommender": None}))
    train, num_items = inputs.split.train, inputs.dataset.num_items
    known_items = training_counts(inputs.split, num_items) > 0
    builder = build_batches(
        config.prompt,
        inputs.dataset.items,
        load_tokenizer(config.lm),
        known_items=known_items,
        max_history=config.mformer.max_history,
    )
    rows = training_rows(train, max(config.prompt.max_items, config.mformer.max_history))
    chosen = np.random.default_rng(0).permutation(len(rows))[:_SAMPLE_ROWS]
    batch = builder.training_batch(rows.select(np.sort(chosen)), with_positives=True)
    assert batch.positives is not None
    return Workload(
        num_items=num_items,
        user_tokens=float(batch.token_lengths.mean()),
        item_tokens=float(batch.positives.token_lengths.mean()),
        history=batch.items.shape[0] / len(batch),
        state_size=getattr(inputs.recommender, "state_size", Workload.state_size),
        measured=True,
    )
