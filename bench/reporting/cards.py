"""Section "cards": what training takes on cards of 8 to 24 GB: planned everywhere, measured where there is a GPU.

    python -m reporting.cards '{"settings": ..., "workload": ..., "limit_bytes": ..., "tokens": ..., ...}'

measures one card, in a process that may take no more of the GPU than the card has, and prints one line of JSON.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from types import SimpleNamespace
from typing import Any

import torch

from laser_fast.config import LaserConfig, build_config
from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.lm.execution.execution import CHECKPOINTING
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.language_model import load_model
from laser_fast.models.assembly import build_execution, laser_parts
from laser_fast.ops import cu_seqlens_from_lengths
from laser_fast.planning.plan import MemoryPlan, estimate_memory
from laser_fast.planning.plan_table import card_bytes
from laser_fast.planning.workload import Workload
from laser_fast.recommenders import SASRec
from laser_fast.training.optimizer import build_optimizer
from reporting.context import Context, Deadline, run_script
from reporting.models import path_of
from reporting.reasons import package_missing
from reporting.tables import NONE, size, table, times

WORKLOAD = Workload(num_items=3686, user_tokens=85, item_tokens=25, history=5)  # means of Amazon Scientific
_START_S = 45  # a process that imports, draws an 8B model and takes a step
_GROWTH = 1.25  # of the tokens of a step, while the most that fit are searched for
_RESOLUTION = 256  # tokens


def card_settings(context: Context, mode: str) -> dict[str, Any]:
    """The configuration that is planned and measured: the authors' M-Former, everything that saves memory switched on.

    Only `execution.checkpointing` is left open.
    """
    packed = not package_missing("bitsandbytes")
    lm = {
        "path": path_of(context.settings.card_shape, context.folder),
        "quantization": "nf4" if packed else "none",
        "dtype": "bfloat16",
        "embedding_device": "cpu",
    }
    return {
        "data": "none",
        "recommender": "none",
        "output": "none",
        "lm": lm,
        "execution": {"checkpointing": mode, "checkpoint_mformer": True},
        "bituning": {"head": "none"},
        "text": {"residual": False},
        "objective": {"mask_history": False, "popularity": False},
        "mformer": dict(context.settings.card_mformer),
        "training": {"optimizer": {"eight_bit": packed}},
    }


def card_plan(context: Context) -> MemoryPlan:
    """The plan of that configuration in every mode."""
    return estimate_memory(build_config(LaserConfig, card_settings(context, "none")), WORKLOAD, on_gpu=True)


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """The plan for every mode and card, and for every card a step of the proposed size and the largest that fits."""
    plan = card_plan(context)
    cards = [planned(plan, card) for card in context.settings.cards]
    left_out = [] if context.on_gpu else ["measurements on cards: there is no GPU, so these are plans"]
    for index, row in enumerate(cards):
        if context.on_gpu and row["proposal"] is not None:
            share_s = deadline.left_s / (len(cards) - index)
            row |= _measured(context, plan, row, share_s, left_out)
    return {
        "shape": context.settings.card_shape,
        "weights": "NF4" if not package_missing("bitsandbytes") else "bfloat16",
        "fixed_bytes": plan.fixed,
        "modes": {
            mode: {"base_bytes": plan.total(0, mode), "bytes_per_token": step.moments[-1].per_token}
            for mode, step in plan.step.items()
        },
        "row_tokens": plan.row_tokens,
        "cards": cards,
        "left_out": left_out,
    }


def planned(plan: MemoryPlan, card: str) -> dict[str, Any]:
    """What fits on a card by mode, and what the plan proposes for it."""
    budget = card_bytes(card)
    proposal = plan.propose(budget)
    row: dict[str, Any] = {
        "card": card,
        "bytes": budget,
        "planned_tokens": {mode: plan.largest_micro_batch(budget, mode) for mode in CHECKPOINTING if mode in plan.step},
        "proposal": None if proposal is None else vars(proposal),
    }
    if proposal is not None:
        row["planned_bytes"] = plan.total(proposal.micro_batch_tokens, proposal.checkpointing)
    return row


def card_order(context: Context, plan: MemoryPlan, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for a card: the proposed step, in what the CUDA context leaves."""
    return {
        "settings": card_settings(context, row["proposal"]["checkpointing"]),
        "workload": vars(WORKLOAD),
        "limit_bytes": row["bytes"] - plan.fixed["CUDA context"],
        "tokens": row["proposal"]["micro_batch_tokens"],
        "row_tokens": plan.row_tokens,
    }


def _measured(
    context: Context, plan: MemoryPlan, row: Mapping[str, Any], share_s: float, left_out: list[str]
) -> dict[str, Any]:
    card, outside = row["card"], plan.fixed["CUDA context"]
    if share_s < _START_S:
        left_out.append(f"{card}: {share_s:.0f} s were left, and a measurement takes {_START_S}")
        return {}
    if row["bytes"] > torch.cuda.mem_get_info()[0]:
        left_out.append(f"{card}: the GPU has less free memory than that")
        return {}
    order = card_order(context, plan, row) | {"seconds": share_s - _START_S / 2}
    try:
        said = run_script(["-m", "reporting.cards", json.dumps(order)], timeout_s=share_s + _START_S / 2)
    except subprocess.TimeoutExpired:
        left_out.append(f"{card}: not done after {share_s:.0f} s")
        return {}
    found = json.loads(said.splitlines()[-1])
    if found["fits"]:
        found["reserved_over_planned"] = found["reserved_bytes"] / (row["planned_bytes"] - outside)
    return {"measured": found}


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

    return replace(
        sequences(work.user_tokens, work.history),
        targets=torch.arange(rows) % work.num_items,
        positives=sequences(work.item_tokens, 1),
        positive_targets=torch.arange(rows),
    )


def largest_that_fits(fits: Callable[[int], bool], tokens: int, fit: bool, seconds: float) -> tuple[int, bool]:
    """The most tokens for which `fits` says yes, and whether they were found between two bounds within that time.

    Args:
        tokens: that were tried.
        fit: whether they fit; else the first that do on the way down end the search, and 0 says that none were found.
    """
    end, low, high = monotonic() + seconds, tokens, None
    if not fit:
        while monotonic() < end and low > _RESOLUTION:
            low = round(low / _GROWTH)
            if fits(low):
                return low, False
        return 0, False
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
        order: see `card_order`.
    """

    def __init__(self, order: Mapping[str, Any], device: torch.device) -> None:
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, order["limit_bytes"] / total), device)
        config = build_config(LaserConfig, order["settings"])
        self._device, self._row_tokens, self._work = device, order["row_tokens"], Workload(**order["workload"])
        self._model = build_model(config, self._work, device)
        self._optimizer = build_optimizer(self._model, config.training.optimizer)

    def fits(self, tokens: int) -> bool:
        """Whether a step of so many tokens does."""
        self._on_gpu(torch.cuda.empty_cache)
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
        """Whether a step fits, and its peak."""
        for _ in range(2):  # the second step finds the optimizer's state in its place
            self._on_gpu(torch.cuda.empty_cache)
            self._on_gpu(torch.cuda.reset_peak_memory_stats)
            if not (fits := self.fits(tokens)):
                break
        return {
            "fits": fits,
            "allocated_bytes": self._on_gpu(torch.cuda.max_memory_allocated),
            "reserved_bytes": self._on_gpu(torch.cuda.max_memory_reserved),
        }

    def _on_gpu(self, function: Callable[[], Any]) -> Any:
        return function() if self._device.type == "cuda" else None


def measure_card(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order of the section."""
    start, tokens = monotonic(), order["tokens"]
    card = Card(order, torch.device("cuda", torch.cuda.current_device()))
    found = card.peak(tokens)
    left_s = order["seconds"] - (monotonic() - start)
    largest, bisected = largest_that_fits(card.fits, tokens, found["fits"], left_s)
    return found | {"tokens": tokens, "largest_tokens": largest, "bisected": bisected}


def markdown(found: Mapping[str, Any]) -> list[str]:
    """The plan by card and mode, the proposals, and what was measured of them."""
    modes = list(found["modes"])
    rows = [[row["card"], *(f"{row['planned_tokens'][mode]}" for mode in modes)] for row in found["cards"]]
    head = ["card", "recomputed", "tokens", "planned", "fits", "reserved", "reserved / planned", "most tokens that fit"]
    fixed = ", ".join(f"{name} {size(num)}" for name, num in found["fixed_bytes"].items() if num)
    emulated = any("measured" in row for row in found["cards"])
    how = (
        "Cards are emulated: a process of its own may take of this GPU what the card has beside the CUDA context."
        if emulated
        else "Planned, not measured."
    )
    return [
        f"Training with {found['shape']} in {found['weights']}, embeddings on the host, the authors' M-Former "
        f"(recomputed), Adam in 8 bits where bitsandbytes is there, rows of {found['row_tokens']:.0f} packed tokens. "
        f"Fixed: {fixed}. {how}",
        "",
        "Planned packed tokens of a micro-batch, by what is recomputed:",
        "",
        *table(["card", *modes], rows),
        "",
        "What the plan proposes:",
        "",
        *table(head, [_proposal(row) for row in found["cards"]]),
    ]


def _proposal(row: Mapping[str, Any]) -> list[str]:
    proposal, measured = row["proposal"], row.get("measured")
    if proposal is None:
        return [row["card"], "does not fit", *[NONE] * 6]
    line = [row["card"], proposal["checkpointing"], f"{proposal['micro_batch_tokens']}", size(row["planned_bytes"])]
    if measured is None:
        return [*line, "not measured", *[NONE] * 3]
    if not measured["fits"]:
        return [*line, "no", NONE, NONE, f"{measured['largest_tokens'] or NONE}"]
    most = f"{measured['largest_tokens']}{'' if measured['bisected'] else ' or more'}"
    return [*line, "yes", size(measured["reserved_bytes"]), times(measured["reserved_over_planned"]), most]


if __name__ == "__main__":
    print(json.dumps(measure_card(json.loads(sys.argv[1]))))
