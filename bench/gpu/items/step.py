"""Item 4: forward and backward of a frozen 8B model in 4 bits, beside the same padded by Hugging Face."""

from functools import cached_property, partial
from typing import Any

from gpu.work import Found, Prediction, Work, against_strongest

_TOKENS = (4096, 1024, 16384)
_NAME, _HALF = "8B in 4 bits, {:,} packed tokens", "8B in bfloat16, {:,} packed tokens"
_PREDICTED = {
    4096: Prediction(18_800, "products at 75 % of the peak, one pass for everything else, 4 bits unpacked twice"),
}


def names(rehearse: bool) -> list[str]:
    """By tokens; the same weights in 16 bits come last."""
    tokens = _TOKENS[:1] if rehearse else _TOKENS
    return [*map(_NAME.format, tokens), _HALF.format(_TOKENS[0])]


def run(work: Work) -> None:
    """The model is loaded once for all lines of its kind."""
    packed, half = Models(work, "nf4"), Models(work, "none")
    for tokens in _TOKENS:
        work.measure(_NAME.format(tokens), partial(packed.measure, tokens, _PREDICTED.get(tokens)))
    packed.__dict__.clear()  # its memory, before the other comes
    work.measure(_HALF.format(_TOKENS[0]), partial(half.measure, _TOKENS[0], None))


class Models:
    """A model with weights of one kind, "nf4" or "none", and its steps."""

    def __init__(self, work: Work, weights: str) -> None:
        self._work, self._weights = work, weights

    @cached_property
    def _model(self) -> Any:
        from reporting.models import load
        from reporting.reasons import Skip, package_missing

        if self._weights == "nf4" and package_missing("bitsandbytes"):
            raise Skip("no bitsandbytes")
        context = self._work.context
        return load(context, context.settings.waterfall[0], self._weights)

    def measure(self, tokens: int, prediction: Prediction | None) -> Found:
        """Tokens a second, in turn with the padded forms that fit into the memory."""
        from peak_memory import peak_of
        from reporting.models import PackedStep, floor_operations, packed_lengths
        from reporting.step import timed_step
        from steps import twin

        from laser_fast.lm.execution.execution import Execution
        from laser_fast.lm.frozen_lm import FrozenLM

        context = self._work.context
        lengths = packed_lengths(context.settings.mode_tokens if self._work.rehearse else tokens)
        operations = floor_operations(self._model, lengths)
        step = PackedStep(FrozenLM(twin(self._model), Execution(checkpointing="none")), lengths)
        step()  # compiles what there is to compile
        peak = peak_of(step, context.device)
        timed = timed_step(context, step, operations, int(lengths.sum()), self._padded(step, lengths))
        others = {name: seconds / timed["seconds"] for name, seconds in timed.pop("others").items()}
        more = {"step": timed | peak._asdict(), "speedups": others, "sequences": len(lengths)}
        found = Found(timed["tokens_per_s"], "tokens/s", limit="FLOP floor", prediction=prediction, more=more)
        found.share_of_limit = timed["share_of_floor"]
        return against_strongest(found, others)

    def _padded(self, step: Any, lengths: Any) -> dict[str, Any]:
        """Hugging Face's forms over the same weights that fit into the memory, after they gave the same gradient."""
        import torch
        from baselines.padded_step import with_checkpointing
        from peak_memory import release
        from reporting.waterfall import PaddedStep, check_gradient
        from steps import twin

        expected, found = step(), {}
        for name, change in {"padded": lambda model: model, "padded and recomputed": with_checkpointing}.items():
            form = PaddedStep(change(twin(self._model)), step, lengths)
            try:
                actual = form()
            except torch.OutOfMemoryError:
                release()
                continue
            check_gradient(name, actual, expected, self._work.context.settings.dtype)
            found[name] = form
        return found
