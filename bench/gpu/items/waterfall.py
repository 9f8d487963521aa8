"""Item 5: from Hugging Face's padded form to ours, each switch in turn with the state before it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from gpu.work import Found, Prediction, Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_FIRST = "padded, every layer recomputed"
_SWITCHES = [  # as `reporting.waterfall` names them, which cannot be imported without torch
    "packing",
    "fused norms, MLPs and rotation",
    "one unpacking for recomputation and backward",
    "gate and up alone recomputed",
    "nothing recomputed",
    "last layer for what is read out",
    "weights not packed",
]
_SOURCE = "8B in 4 bits, 4,096 tokens: products at 75 % of the peak, the rest at the speed of a copy"


def names(rehearse: bool) -> list[str]:
    """The first state and the switches."""
    return [_FIRST, *_SWITCHES]


def run(work: Work) -> None:
    """One model for all of them."""
    steps = Steps(work)
    for before, name in zip([None, _FIRST, *_SWITCHES], names(work.rehearse), strict=False):
        work.measure(name, partial(steps.measure, name, before))


class Steps:
    """Steps by the name of their state, made when they are asked for; at most two are kept.

    Args:
        work: of the item.
    """

    def __init__(self, work: Work) -> None:
        from reporting.models import packed_lengths

        self._work = work
        self._shape, self._tokens = work.context.settings.waterfall
        self._lengths = packed_lengths(self._tokens)
        self._made: dict[str, Callable[[], Tensor]] = {}
        self._states: object = None

    def measure(self, name: str, before: str | None) -> Found:
        """Microseconds a token, and the gain over the state before."""
        from reporting.memory import peak_of, release
        from reporting.waterfall import check_gradient
        from timing import interleaved_medians

        context, rounds = self._work.context, 3
        runs = {key: self._step(key) for key in (name, before) if key is not None}
        self._made = runs
        release()
        if before is not None and name != _SWITCHES[-1]:  # the last one has other random weights
            check_gradient(name, runs[name](), runs[before](), context.settings.dtype)
        peak = peak_of(runs[name], context.device)
        seconds = interleaved_medians(runs, context.clock, 0.0, rounds)
        return Found(
            1e6 * seconds[name] / self._tokens,
            "us/token",
            baseline=before,
            speedup=seconds[before] / seconds[name] if before else None,
            prediction=self._prediction(name),
            more={"step_bytes": peak.step, "tokens": self._tokens},
        )

    def _step(self, name: str) -> Callable[[], Tensor]:
        from reporting.models import usable_weights
        from reporting.reasons import Skip
        from reporting.waterfall import CUMULATIVE, States

        if name in self._made:
            return self._made[name]
        kinds, left_out = usable_weights(self._work.context)
        if self._states is None:
            self._states = States(self._work.context, self._shape, kinds[0], self._lengths)
        assert isinstance(self._states, States)
        if self._states.changes_nothing(CUMULATIVE[name]):
            raise Skip("; ".join(left_out))
        return self._states.step(CUMULATIVE[name])

    def _prediction(self, name: str) -> Prediction | None:
        from reporting.predictions import WATERFALL, packing_gain

        if name == _FIRST:
            return None
        longest, tokens = int(self._lengths.max()), int(self._lengths.sum())
        gain = packing_gain(longest * len(self._lengths) / tokens) if name == "packing" else WATERFALL[name]
        return Prediction(gain, _SOURCE, of="speedup")
