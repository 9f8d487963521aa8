"""Item 7: a training step of an 8B model in the memory of a small card: the plan beside what the allocator counts."""

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
    plans: dict[str, Any] = {}
    for card in _CARDS:
        emulated = Emulated(work, plans, card)
        work.measure(_PEAK.format(card), emulated.peak, attention="mixed")
        work.measure(_MOST.format(card), emulated.most, attention="mixed")
        emulated.__dict__.clear()
        if plans:
            from peak_memory import release

            release()


class Emulated:
    """A process that may take no more of the GPU than a card has.

    Args:
        plans: gets the plan, which is that of all cards.
    """

    def __init__(self, work: Work, plans: dict[str, Any], card: str) -> None:
        self._work, self._plans, self._name = work, plans, card

    @cached_property
    def _plan(self) -> Any:
        from reporting.cards import card_plan

        if "plan" not in self._plans:
            self._plans["plan"] = card_plan(self._work.context)
        return self._plans["plan"]

    @cached_property
    def _row(self) -> dict[str, Any]:
        from reporting.cards import planned

        return planned(self._plan, self._name)

    @cached_property
    def _card(self) -> Any:
        from reporting.cards import Card, card_order
        from reporting.reasons import Skip

        if self._row["proposal"] is None:
            raise Skip("the plan says that nothing fits")
        order = card_order(self._work.context, self._plan, self._row)
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
        found, outside = self._found, self._plan.fixed["CUDA context"]
        planned = self._row["planned_bytes"] - outside
        reserved = found["reserved_bytes"] or 0
        more = {"tokens": self._tokens, "proposal": self._row["proposal"], "allocated_bytes": found["allocated_bytes"]}
        return Found(
            reserved / 2**30,
            "GiB reserved",
            limit="what the context leaves of the card",
            share_of_limit=reserved / (self._row["bytes"] - outside),
            prediction=Prediction(planned / 2**30, "laser-fast plan", device=""),
            failure=None if found["fits"] else "the proposed step does not fit",
            more=more,
        )

    def most(self) -> Found:
        """Packed tokens of the largest step, beside what the plan says of this mode."""
        from reporting.cards import largest_that_fits

        fits, mode = self._found["fits"], self._row["proposal"]["checkpointing"]
        seconds = 0.0 if self._work.rehearse else min(_SEARCH_S, self._work.left_s / 3)
        largest, bisected = largest_that_fits(self._card.fits, self._tokens, fits, seconds)
        expected = Prediction(self._row["planned_tokens"][mode], "laser-fast plan", device="")
        unit = "tokens or more" if fits and not bisected else "tokens"
        return Found(largest, unit, prediction=expected, more={"checkpointing": mode})
