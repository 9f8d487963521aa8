"""Takes training steps in as much GPU memory as a small card has: a process of its own for the section "cards".

    python -m reporting.card_job '{"settings": ..., "limit_bytes": ..., "tokens": ...}'

Prints one line of JSON: whether a step of so many tokens fits, its peak, and the most tokens that fit.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from laser_fast.config import LaserConfig, build_config
from laser_fast.data.batches import PackedBatch
from laser_fast.models import LaserModel, SASRec
from laser_fast.models.assembly import build_execution, laser_parts
from laser_fast.models.language_model import load_model
from laser_fast.nn.frozen_lm import FrozenLM
from laser_fast.ops import cu_seqlens_from_lengths
from laser_fast.training.optimizer import build_optimizer
from laser_fast.training.plan import Workload

_GROWTH = 1.25
_RESOLUTION = 256  # tokens


def build_model(config: LaserConfig, work: Workload, device: torch.device) -> LaserModel:
    """The model that the configuration trains, with a random recommender and item matrix."""
    frozen = FrozenLM(load_model(config.lm).to(device), build_execution(config.execution))
    builder: Any = SimpleNamespace(num_items=work.num_items)
    recommender = SASRec(work.num_items, width=work.state_size)
    ids = [str(index) for index in range(work.num_items)]
    model = LaserModel(**laser_parts(config, frozen, builder, ids, recommender))
    model.item_matrix = torch.randn(work.num_items, frozen.hidden_size)
    return model.to(device).train()


def batch_of(rows: int, work: Workload, vocabulary: int) -> PackedBatch:
    """Users and their positives, all of the mean length."""

    def sequences(tokens: float, history: float) -> PackedBatch:
        lengths, items = torch.full((rows,), round(tokens)), torch.full((rows,), round(history))
        return PackedBatch(
            torch.randint(0, work.num_items, (int(items.sum()),)),
            cu_seqlens_from_lengths(items),
            torch.randint(0, vocabulary, (int(lengths.sum()),)),
            cu_seqlens_from_lengths(lengths),
        )

    targets: Tensor = torch.arange(rows) % work.num_items
    return replace(
        sequences(work.user_tokens, work.history),
        targets=targets,
        positives=sequences(work.item_tokens, 1),
        positive_targets=torch.arange(rows),
    )


def largest_that_fits(fits: Callable[[int], bool], tokens: int, seconds: float) -> tuple[int, bool]:
    """The most tokens for which `fits` says yes, and whether it was found between two bounds before the time was over.

    Args:
        tokens: known to fit, or 0.
    """
    end, low, high = monotonic() + seconds, tokens, None
    while monotonic() < end and (high is None or high - low > _RESOLUTION):
        middle = round(low * _GROWTH) if high is None else (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low, high is not None and high - low <= _RESOLUTION


def main(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order of the section."""
    start = monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, order["limit_bytes"] / total), device)
    config, work = build_config(LaserConfig, order["settings"]), Workload(**order["workload"])
    model = build_model(config, work, device)
    optimizer = build_optimizer(model, config.training.optimizer)

    def fits(tokens: int) -> bool:
        rows = max(1, round(tokens / order["row_tokens"]))
        batch = batch_of(rows, work, model.lm.model.config.vocab_size)
        try:
            model(batch.to(device)).loss.backward()
            optimizer.step()
            torch.cuda.synchronize()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad(set_to_none=True)
            gc.collect()

    def peak(tokens: int) -> dict[str, Any]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        done = fits(tokens)
        return {
            "fits": done,
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    found = peak(order["tokens"])
    if found["fits"]:  # again with the optimizer's state in its place
        found = peak(order["tokens"])

    def fits_afresh(tokens: int) -> bool:
        torch.cuda.empty_cache()
        return fits(tokens)

    left_s = order["seconds"] - (monotonic() - start)
    known = order["tokens"] if found["fits"] else 0
    if known:
        largest, bisected = largest_that_fits(fits_afresh, known, left_s)
    else:
        largest, bisected = _below(fits_afresh, order["tokens"], left_s)
    return found | {"tokens": order["tokens"], "largest_tokens": largest, "bisected": bisected}


def _below(fits: Callable[[int], bool], tokens: int, seconds: float) -> tuple[int, bool]:
    """The same where the proposal does not fit: the first that does on the way down; 0 where none was found."""
    end = monotonic() + seconds
    while monotonic() < end and tokens > _RESOLUTION:
        tokens = round(tokens / _GROWTH)
        if fits(tokens):
            return tokens, False
    return 0, False


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
