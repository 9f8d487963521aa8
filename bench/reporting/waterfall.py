"""Section "waterfall": from Hugging Face's padded form to ours one switch at a time, and each turned off again."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from baselines.padded_step import with_checkpointing
from forms import relative_error
from peak_memory import peak_of, release
from steps import twin
from timing import interleaved_medians
from torch import Tensor
from transformers import PreTrainedModel

from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.frozen_lm import FrozenLM
from reporting.context import Context, Deadline
from reporting.models import PackedStep, load, packed_lengths, usable_weights, weights_name
from reporting.predictions import WATERFALL, packing_gain
from reporting.tables import NONE, plain, size, table, times

# Of the gradient: its worst row in float32; all of it in bfloat16, where two right forms of 32 random layers differ by
# 0.13 and in single rows by 0.4, either as far from float32 as from the other. A wrong formula is off by about 1.
_WORST_ERROR = {"float32": 1e-3, "bfloat16": 0.4}
_ROUNDS = 5
_PACKED = Execution(checkpointing="full", fused=False, share_dequantization=False, last_layer="all")
_FUSED = replace(_PACKED, fused=True)
_SHARED = replace(_FUSED, share_dequantization=True)
_MLP = replace(_SHARED, checkpointing="mlp")
_NONE = replace(_SHARED, checkpointing="none")
_FINAL = replace(_NONE, last_layer="readout")


@dataclass(frozen=True)
class State:
    """A way to run the same step.

    Attributes:
        execution: None = Hugging Face's padded form.
        checkpointed: of that form.
        weights: None = those of the section.
    """

    execution: Execution | None
    checkpointed: bool = False
    weights: str | None = None


CUMULATIVE = {  # in the order in which the switches are turned on; named as the predictions name them
    "padded, every layer recomputed": State(None, checkpointed=True),
    "packing": State(_PACKED),
    "fused norms, MLPs and rotation": State(_FUSED),
    "one unpacking for recomputation and backward": State(_SHARED),
    "gate and up alone recomputed": State(_MLP),
    "nothing recomputed": State(_NONE),
    "last layer for what is read out": State(_FINAL),
    "weights not packed": State(_FINAL, weights="none"),
}
TURNED_OFF = {  # of the state before the last
    "packing (padded, nothing recomputed)": State(None),
    "fused norms, MLPs and rotation": State(replace(_FINAL, fused=False)),
    "last layer for what is read out": State(_NONE),  # the line above the last, so it runs once
    "keeping gate and up": State(replace(_FINAL, checkpointing="mlp")),
    "keeping anything": State(replace(_FINAL, checkpointing="full")),
    "keeping anything, two unpackings": State(replace(_FINAL, checkpointing="full", share_dequantization=False)),
}
FINAL = "last layer for what is read out"
Step = Callable[[], Tensor]  # gives the gradient of the embeddings
_WITHOUT_READOUT = "nothing recomputed"


class PaddedStep:
    """The sequences of a packed step as Hugging Face runs them: padded to the longest, sdpa, whole mask."""

    def __init__(self, model: PreTrainedModel, packed: PackedStep, lengths: Tensor) -> None:
        self.model, self.packed = model, packed
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        self.place = (mask.flatten().cumsum(0) - 1).clamp_min(0).to(packed.embeds.device)
        self.mask = mask.long().to(packed.embeds.device)
        self.last = (lengths - 1).to(packed.embeds.device)

    def states(self) -> Tensor:
        """[B, D] of the last position of every sequence."""
        rows = (self.packed.embeds * 1.0)[self.place].view(*self.mask.shape, -1)
        hidden = self.model(inputs_embeds=rows, attention_mask=self.mask, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(self.last), device=hidden.device), self.last]

    def __call__(self) -> Tensor:
        """The gradient of the embeddings."""
        return torch.autograd.grad(self.states(), self.packed.embeds, self.packed.gradient)[0]


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """Time and memory of every state, all in turn in one run."""
    shape, tokens = context.settings.waterfall
    kinds, left_out = usable_weights(context)
    lengths = packed_lengths(tokens)
    steps = _steps(context, shape, kinds[0], lengths)
    start = perf_counter()
    found = _peaks(context, steps)
    rounds = deadline.rounds(perf_counter() - start, _ROUNDS)
    runs = {name: step for name, step in steps.items() if name in found}
    seconds = interleaved_medians(runs, context.clock, 0.0, rounds)
    for name, value in seconds.items():
        found[name] |= {"seconds": value, "us_per_token": 1e6 * value / tokens}
    ratio = int(lengths.max()) * len(lengths) / tokens
    return {
        "shape": shape,
        "weights": weights_name(kinds[0], context.settings.dtype),
        "tokens": tokens,
        "sequences": len(lengths),
        "rounds": rounds,
        "padding_ratio": ratio,
        "left_out": left_out,
        "cumulative": _cumulative(found, ratio),
        "turned_off": _turned_off(found),
    }


class States:
    """Makes steps in any state, over the same weights where they are of the same kind."""

    def __init__(self, context: Context, shape: str, weights: str, lengths: Tensor) -> None:
        self._context, self._shape, self._weights, self._lengths = context, shape, weights, lengths
        self._packed: PackedStep | None = None
        self._models = {weights: load(context, shape, weights)}

    def changes_nothing(self, state: State) -> bool:
        """Whether it asks for weights that are not packed where they were not in the first place."""
        return state.weights == self._weights

    def step(self, state: State) -> Step:
        """A step with modules of its own.

        Raises:
            torch.OutOfMemoryError: weights of its kind do not fit beside the others.
        """
        kind = state.weights or self._weights
        if kind not in self._models:
            self._models[kind] = load(self._context, self._shape, kind)
        model = twin(self._models[kind])
        if state.execution is not None:
            return PackedStep(FrozenLM(model, state.execution), self._lengths)
        self._packed = self._packed or PackedStep(FrozenLM(twin(model), _FINAL), self._lengths)
        return PaddedStep(with_checkpointing(model) if state.checkpointed else model, self._packed, self._lengths)


def _steps(context: Context, shape: str, weights: str, lengths: Tensor) -> dict[str, Step]:
    """By "on NAME" and "off NAME"."""
    states = States(context, shape, weights, lengths)
    wanted = {f"on {name}": state for name, state in CUMULATIVE.items()}
    wanted |= {f"off {name}": state for name, state in TURNED_OFF.items()}
    wanted.pop(f"off {FINAL}")
    steps: dict[str, Step] = {}
    for name, state in wanted.items():
        if not states.changes_nothing(state):
            with suppress(torch.OutOfMemoryError):
                steps[name] = states.step(state)
    return steps


def _peaks(context: Context, steps: Mapping[str, Step]) -> dict[str, dict[str, Any]]:
    """Peak and error of each against the final state; those that run out of memory are not there.

    Raises:
        RuntimeError: a state computes something else.
    """
    expected = steps[f"on {FINAL}"]()
    found = {}
    for name, step in steps.items():
        try:
            results: list[Tensor] = []
            found[name] = {"step_bytes": peak_of(lambda step=step: results.append(step()), context.device).step}
            if "weights not packed" not in name:  # those are other random weights
                check_gradient(name, results[0], expected, context.settings.dtype)
        except torch.OutOfMemoryError:
            release()
    return found


def check_gradient(name: str, actual: Tensor, expected: Tensor, dtype: str) -> None:
    """Raise RuntimeError where a state's gradient is further off than rounding explains."""
    pair = (actual, expected) if dtype == "float32" else (actual.flatten(), expected.flatten())
    error = relative_error(*pair)
    if not error < _WORST_ERROR[dtype]:
        raise RuntimeError(
            f'waterfall: "{name}" must give the gradients of the final state, got one that is off by {error:.1e}'
        )


def _cumulative(found: Mapping[str, Mapping[str, Any]], padding_ratio: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    first = found.get(f"on {next(iter(CUMULATIVE))}", {}).get("us_per_token")
    before, predicted = first, 1.0
    for name in CUMULATIVE:
        row = dict(found.get(f"on {name}", {})) | {"name": name}
        gain = packing_gain(padding_ratio) if name == "packing" else WATERFALL.get(name, 1.0)
        predicted *= gain
        now = row.get("us_per_token")
        if rows:
            row |= {"gain": before / now if before and now else None, "predicted_gain": gain}
        row |= {"cumulative_gain": first / now if first and now else None, "predicted_cumulative_gain": predicted}
        before = now or before
        rows.append(row)
    return rows


def _turned_off(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    final, rows = found[f"on {FINAL}"], []
    for name in TURNED_OFF:
        measured = f"on {_WITHOUT_READOUT}" if name == FINAL else f"off {name}"
        row = dict(found.get(measured, {})) | {"name": name}
        if "seconds" in row:
            row["slower"] = row["seconds"] / final["seconds"]
            row["more_bytes"] = row["step_bytes"] - final["step_bytes"]
        rows.append(row)
    return rows


def markdown(found: Mapping[str, Any]) -> list[str]:
    """Two tables: the switches in their order, and each turned off."""
    lines = []
    for row in found["cumulative"]:
        line = [row["name"], plain(row.get("us_per_token")), times(row.get("gain")), times(row.get("predicted_gain"))]
        line += [times(row["cumulative_gain"]), times(row["predicted_cumulative_gain"]), size(row.get("step_bytes"))]
        lines.append(line)
    head = ["state", "us/token", "gain", "predicted gain", "in all", "predicted in all", "peak of the step"]
    off = []
    for row in found["turned_off"]:
        more = row.get("more_bytes")
        sign = "" if more is None else "+" if more >= 0 else "-"
        change = NONE if more is None else sign + size(abs(more))
        off.append([row["name"], plain(row.get("us_per_token")), times(row.get("slower")), change])
    return [
        f"{found['shape']} in {found['weights']}, {found['tokens']} useful tokens in {found['sequences']} sequences; "
        f"the padded form computes {found['padding_ratio']:.2f} times as many. Every line has the switches above it. "
        f"All states run in turn, {found['rounds']} times; their gradients were compared first.",
        "The predicted gains are for an H100 and an 8B model in 4 bits; packing is scaled to this padding.",
        "",
        *table(head, lines),
        "",
        f'Each switch alone turned off, from "{FINAL}":',
        "",
        *table(["turned off", "us/token", "time", "peak of the step"], off),
    ]
