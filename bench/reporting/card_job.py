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
from laser_fast.laser import LaserModel
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.language_model import load_model
from laser_fast.models.assembly import build_execution, laser_parts
from laser_fast.ops import cu_seqlens_from_lengths
from laser_fast.planning.plan import Workload
from laser_fast.recommenders import SASRec
from laser_fast.training.optimizer import build_optimizer

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


class Card:
    """A model in training that may take no more memory than a card has; on a CPU as much as there is.

    Args:
        order: of the section: "settings", "workload", "limit_bytes", "row_tokens".
        device: where it trains.
    """

    def __init__(self, order: dict[str, Any], device: torch.device) -> None:
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, order["limit_bytes"] / total), device)
        config = build_config(LaserConfig, order["settings"])
        self._device, self._row_tokens, self._work = device, order["row_tokens"], Workload(**order["workload"])
        self._model = build_model(config, self._work, device)
        self._optimizer = build_optimizer(self._model, config.training.optimizer)

    def fits(self, tokens: int) -> bool:
        """Whether a step of so many tokens does."""
        rows = max(1, round(tokens / self._row_tokens))
        batch = batch_of(rows, self._work, self._model.lm.model.config.vocab_size)
        try:
            self._model(batch.to(self._device)).loss.backward()
            self._optimizer.step()
            self._on_gpu(torch.cuda.synchronize)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            self._optimizer.zero_grad(set_to_none=True)
            gc.collect()

    def peak(self, tokens: int) -> dict[str, Any]:
        """Of a step, with the optimizer's state in its place."""
        found = self._peak(tokens)
        return self._peak(tokens) if found["fits"] else found

    def _peak(self, tokens: int) -> dict[str, Any]:
        self._on_gpu(torch.cuda.empty_cache)
        self._on_gpu(torch.cuda.reset_peak_memory_stats)
        return {
            "fits": self.fits(tokens),
            "allocated_bytes": self._on_gpu(torch.cuda.max_memory_allocated),
            "reserved_bytes": self._on_gpu(torch.cuda.max_memory_reserved),
        }

    def largest(self, tokens: int, fits: bool, seconds: float) -> tuple[int, bool]:
        """See `largest_that_fits`.

        Args:
            tokens: of a step that was taken.
            fits: whether it did.
            seconds: for the search.
        """

        def afresh(tokens: int) -> bool:
            self._on_gpu(torch.cuda.empty_cache)
            return self.fits(tokens)

        return largest_that_fits(afresh, tokens, seconds) if fits else _below(afresh, tokens, seconds)

    def _on_gpu(self, function: Callable[[], Any]) -> Any:
        return function() if self._device.type == "cuda" else None


def main(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order of the section."""
    start, tokens = monotonic(), order["tokens"]
    card = Card(order, torch.device("cuda", torch.cuda.current_device()))
    found = card.peak(tokens)
    largest, bisected = card.largest(tokens, found["fits"], order["seconds"] - (monotonic() - start))
    return found | {"tokens": tokens, "largest_tokens": largest, "bisected": bisected}


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
