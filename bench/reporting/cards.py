"""Section "cards": what training takes on cards of 8 to 24 GB: planned everywhere, measured where there is a GPU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from laser_fast.config import LaserConfig, build_config
from laser_fast.lm.execution.execution import CHECKPOINTING
from laser_fast.planning.plan import MemoryPlan, Workload, estimate_memory
from laser_fast.planning.plan_table import card_bytes
from reporting.context import package_missing, run_script
from reporting.models import path_of
from reporting.tables import NONE, size, table, times

if TYPE_CHECKING:
    from reporting.context import Context, Deadline

WORKLOAD = Workload(num_items=3686, user_tokens=85, item_tokens=25, history=5)  # means of Amazon Scientific
_START_S = 45  # a process that imports, draws an 8B model and takes a step


def card_settings(context: Context, mode: str) -> dict[str, Any]:
    """The configuration that is planned and measured: the authors' M-Former, everything that saves memory switched on.

    Only `execution.checkpointing` is left open.
    """
    packed = not package_missing("bitsandbytes")
    return {
        "data": "none",
        "recommender": "none",
        "output": "none",
        "lm": {
            "path": path_of(context.settings.card_shape, context.folder),
            "quantization": "nf4" if packed else "none",
            "dtype": "bfloat16",
            "embedding_device": "cpu",
        },
        "execution": {"checkpointing": mode, "checkpoint_mformer": True},
        "bituning": {"head": "none"},
        "text": {"residual": False},
        "objective": {"mask_history": False, "popularity": False},
        "mformer": dict(context.settings.card_mformer),
        "training": {"optimizer": {"eight_bit": packed}},
    }


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """The plan for every mode and card, and for every card a step of the proposed size and the largest that fits."""
    plan = estimate_memory(build_config(LaserConfig, card_settings(context, "none")), WORKLOAD, on_gpu=True)
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
    """What `reporting.card_job` is asked for a card: the proposed step, in what the CUDA context leaves."""
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
    """Of a process that may take no more of the GPU than the card has beside the CUDA context."""
    card, outside = row["card"], plan.fixed["CUDA context"]
    if share_s < _START_S:
        left_out.append(f"{card}: {share_s:.0f} s were left, and a measurement takes {_START_S}")
        return {}
    if row["bytes"] > torch.cuda.mem_get_info()[0]:
        left_out.append(f"{card}: the GPU has less free memory than that")
        return {}
    order = card_order(context, plan, row) | {"seconds": share_s - _START_S / 2}
    try:
        said = run_script(["-m", "reporting.card_job", json.dumps(order)], timeout_s=share_s + _START_S / 2)
    except subprocess.TimeoutExpired:
        left_out.append(f"{card}: not done after {share_s:.0f} s")
        return {}
    found = json.loads(said.splitlines()[-1])
    if found["fits"]:
        found["reserved_over_planned"] = found["reserved_bytes"] / (row["planned_bytes"] - outside)
    return {"measured": found}


def markdown(found: Mapping[str, Any]) -> list[str]:
    """The plan by card and mode, the proposals, and what was measured of them."""
    modes = list(found["modes"])
    rows, proposals = [], []
    for row in found["cards"]:
        rows.append([row["card"], *(f"{row['planned_tokens'][mode]}" for mode in modes)])
        proposal, measured = row["proposal"], row.get("measured")
        if proposal is None:
            proposals.append([row["card"], "does not fit", *[NONE] * 6])
            continue
        line = [row["card"], proposal["checkpointing"], f"{proposal['micro_batch_tokens']}"]
        line.append(size(row["planned_bytes"]))
        if measured is None:
            line += ["not measured", *[NONE] * 3]
        elif not measured["fits"]:
            line += ["no", NONE, NONE, f"{measured['largest_tokens'] or NONE}"]
        else:
            line += ["yes", size(measured["reserved_bytes"]), times(measured["reserved_over_planned"])]
            line.append(f"{measured['largest_tokens']}{'' if measured['bisected'] else ' or more'}")
        proposals.append(line)
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
        *table(head, proposals),
    ]
