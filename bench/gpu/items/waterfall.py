"""Item 5: from Hugging Face's padded form to ours, each switch in turn with the state before it."""

from functools import partial
from typing import Any

from reporting.predictions import WATERFALL, packing_gain

from gpu.work import Found, Prediction, Work

_FIRST, _SWITCHES = "padded, every layer recomputed", list(WATERFALL)
_SOURCE = "8B in 4 bits, 4,096 tokens: products at 75 % of the peak, the rest at the speed of a copy"
_ROUNDS = 3


def names(rehearse: bool) -> list[str]:
    """The first state and the switches."""
    return [_FIRST, *_SWITCHES]


def run(work: Work) -> None:
    """One model for all of them."""
    steps = Steps(work)
    for before, name in zip([None, _FIRST, *_SWITCHES], names(work.rehearse), strict=False):
        work.measure(name, partial(steps.measure, name, before))


class Steps:
    """Steps by the name of their state, made when they are asked for; at most two are kept."""

    def __init__(self, work: Work) -> None:
        from reporting.models import packed_lengths

        self._work = work
        self._shape, self._tokens = work.context.settings.waterfall
        self._lengths = packed_lengths(self._tokens)
        self._made: dict[str, Any] = {}
        self._states: Any = None

    def measure(self, name: str, before: str | None) -> Found:
        """Microseconds a token, and the gain over the state before."""
        from peak_memory import peak_of, release
        from reporting.waterfall import check_gradient
        from timing import interleaved_medians

        context = self._work.context
        runs = self._made = {key: self._step(key) for key in (name, before) if key is not None}
        release()
        if before is not None and name != _SWITCHES[-1]:  # the last one has other random weights
            check_gradient(name, runs[name](), runs[before](), context.settings.dtype)
        peak = peak_of(runs[name], context.device)
        seconds = interleaved_medians(runs, context.clock, 0.0, _ROUNDS)
        return Found(
            1e6 * seconds[name] / self._tokens,
            "us/token",
            baseline=before,
            speedup=seconds[before] / seconds[name] if before else None,
            prediction=self._prediction(name),
            more={"step_bytes": peak.step, "tokens": self._tokens},
        )

    def _step(self, name: str) -> Any:
        from reporting.models import usable_weights
        from reporting.reasons import Skip
        from reporting.waterfall import CUMULATIVE, States

        if name in self._made:
            return self._made[name]
        kinds, left_out = usable_weights(self._work.context)
        self._states = self._states or States(self._work.context, self._shape, kinds[0], self._lengths)
        if self._states.changes_nothing(CUMULATIVE[name]):
            raise Skip("; ".join(left_out))
        return self._states.step(CUMULATIVE[name])

    def _prediction(self, name: str) -> Prediction | None:
        if name == _FIRST:
            return None
        ratio = int(self._lengths.max()) * len(self._lengths) / int(self._lengths.sum())
        return Prediction(packing_gain(ratio) if name == "packing" else WATERFALL[name], _SOURCE, of="speedup")
