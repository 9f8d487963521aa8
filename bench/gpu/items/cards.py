"""Item 7: a training step of an 8B model in the memory of a small card: the plan beside what the allocator counts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from gpu.work import Found, Prediction, Work

_CARDS = ("8GB", "24GB")
_PEAK, _MOST = "{}: peak of the proposed step", "{}: most packed tokens of a step"
_SEARCH_S = 8.0


def names(rehearse: bool) -> list[str]:
    """Two lines a card."""
    return [name.format(card) for card in _CARDS for name in (_PEAK, _MOST)]


def run(work: Work) -> None:
    """One card after the other, in this process: a model that is gone counts no more."""
    plans = Plans(work)
    for card in _CARDS:
        emulated = Emulated(work, plans, card)
        work.measure(_PEAK.format(card), emulated.peak, attention="mixed")
        work.measure(_MOST.format(card), emulated.most, attention="mixed")
        emulated.__dict__.clear()
        if "context" in work.__dict__:
            from reporting.memory import release

            release()


class Plans:
    """What the plan says of every card.

    Args:
        work: of the item.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    @cached_property
    def plan(self) -> Any:
        """Of the whole training, rehearsed without values."""
        from reporting.cards import WORKLOAD, card_settings

        from laser_fast.config import LaserConfig, build_config
        from laser_fast.planning.plan import estimate_memory

        settings = card_settings(self._work.context, "none")
        return estimate_memory(build_config(LaserConfig, settings), WORKLOAD, on_gpu=True)


class Emulated:
    """A process that may take no more of the GPU than a card has.

    Args:
        work: of the item.
        plans: see `Plans`.
        card: its name.
    """

    def __init__(self, work: Work, plans: Plans, card: str) -> None:
        self._work, self._plans, self._name = work, plans, card

    @cached_property
    def _row(self) -> dict[str, Any]:
        from reporting.cards import planned

        return planned(self._plans.plan, self._name)

    @cached_property
    def _card(self) -> Any:
        from reporting.card_job import Card
        from reporting.cards import card_order
        from reporting.reasons import Skip

        if self._row["proposal"] is None:
            raise Skip("the plan says that nothing fits")
        order = card_order(self._work.context, self._plans.plan, self._row)
        if self._work.rehearse:
            order["settings"]["lm"] |= {"quantization": "none", "dtype": "float32"}
        return Card(order, self._work.context.device)

    @cached_property
    def _tokens(self) -> int:
        return 200 if self._work.rehearse else self._row["proposal"]["micro_batch_tokens"]

    @cached_property
    def _found(self) -> dict[str, Any]:
        return self._card.peak(self._tokens)

    def peak(self) -> Found:
        """Bytes that torch holds of the device, beside those of the plan."""
        found, proposal = self._found, self._row["proposal"]
        outside = self._plans.plan.fixed["CUDA context"]
        planned = self._row["planned_bytes"] - outside
        reserved = found["reserved_bytes"] or 0
        return Found(
            reserved / 2**30,
            "GiB reserved",
            limit="what the context leaves of the card",
            share_of_limit=reserved / (self._row["bytes"] - outside),
            prediction=Prediction(planned / 2**30, "laser-fast plan", device=""),
            failure=None if found["fits"] else "the proposed step does not fit",
            more={"tokens": self._tokens, "proposal": proposal, "allocated_bytes": found["allocated_bytes"]},
        )

    def most(self) -> Found:
        """Packed tokens of the largest step, beside what the plan says of this mode."""
        fits, mode = self._found["fits"], self._row["proposal"]["checkpointing"]
        seconds = 0.0 if self._work.rehearse else min(_SEARCH_S, self._work.left_s / 3)
        largest, bisected = self._card.largest(self._tokens, fits, seconds)
        expected = Prediction(self._row["planned_tokens"][mode], "laser-fast plan", device="")
        unit = "tokens" if bisected else "tokens or more" if fits else "tokens"
        return Found(largest, unit, prediction=expected, more={"checkpointing": mode})
