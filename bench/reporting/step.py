"""Section "step": the frozen model alone, forward and backward to its inputs: tokens a second and peak memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peak_memory import peak_of, release
from roofline import Product
from timing import Run, interleaved_medians
from torch import Tensor
from transformers import PreTrainedModel

from laser_fast.lm.execution.execution import CHECKPOINTING, Execution
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.planning.plan import MemoryPlan
from reporting.context import Context, Deadline
from reporting.models import (
    PackedStep,
    floor_operations,
    load,
    packed_lengths,
    plan_of_language_model,
    usable_weights,
    weights_name,
)
from reporting.reasons import Skip
from reporting.tables import NONE, percent, plain, size, table, times

_LEAST_ROUNDS = 3


def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
    """Every shape, kind of weights and number of tokens without recomputation; the largest shape in every mode."""
    settings = context.settings
    kinds, left_out = usable_weights(context)
    rows = []
    for shape in settings.shapes:
        for weights in kinds:
            if deadline.over:
                left_out.append(f"{shape} in {weights_name(weights, settings.dtype)}: the time was over")
                continue
            rows += _rows_of_model(context, deadline, shape, weights, left_out)
    if not rows:
        raise Skip("; ".join(left_out))
    lengths = packed_lengths(settings.mode_tokens)
    described = {"mean": float(lengths.double().mean()), "longest": int(lengths.max())}
    return {"rows": rows, "dtype": settings.dtype, "left_out": left_out, "lengths": described}


def _rows_of_model(
    context: Context, deadline: Deadline, shape: str, weights: str, left_out: list[str]
) -> list[dict[str, Any]]:
    settings = context.settings
    name = f"{shape} in {weights_name(weights, settings.dtype)}"
    rows = []
    wanted = list(_wanted(context, shape, weights))
    modes, lengths = list(dict.fromkeys(mode for mode, _ in wanted)), packed_lengths(settings.mode_tokens)
    try:
        model = load(context, shape, weights)
        plan = plan_of_language_model(context, shape, weights, lengths, modes)
        for mode, tokens in wanted:
            if deadline.over:
                left_out.append(f"{name}, {tokens} tokens, checkpointing {mode}: the time was over")
                continue
            row = {"shape": shape, "weights": weights, "checkpointing": mode, "tokens": tokens}
            rows.append(row | _measure_row(context, model, mode, packed_lengths(tokens), plan))
    except torch.OutOfMemoryError:
        left_out.append(f"{name}: the model itself does not fit")
    release()
    return rows


def _wanted(context: Context, shape: str, weights: str) -> Iterator[tuple[str, int]]:
    settings = context.settings
    for tokens in settings.tokens:
        yield "none", tokens
    if shape == settings.shapes[-1] and weights == usable_weights(context)[0][0]:
        for mode in CHECKPOINTING[1:]:
            if mode != "offload" or context.on_gpu:  # host memory is where everything lies already
                yield mode, settings.mode_tokens


def _measure_row(
    context: Context, model: PreTrainedModel, mode: str, lengths: Tensor, plan: MemoryPlan
) -> dict[str, Any]:
    tokens = int(lengths.sum())
    planned = plan.step[mode].peak(tokens)
    resident = plan.fixed_bytes - plan.fixed.get("CUDA context", 0)
    operations = floor_operations(model, lengths)
    found = {"sequences": len(lengths), "floor_operations": operations, "planned_step_bytes": planned}
    step = PackedStep(FrozenLM(model, Execution(checkpointing=mode)), lengths)
    try:
        step()
        peak = peak_of(step, context.device)
        timed = timed_step(context, step, operations, tokens)
    except torch.OutOfMemoryError:
        return found | {"out_of_memory": True}
    if peak.reserved is not None:
        found |= {"planned_bytes": resident + planned, "reserved_bytes": peak.reserved}
        found["reserved_over_planned"] = peak.reserved / (resident + planned)
    timed.pop("others")
    return found | timed | {"step_bytes": peak.step, "step_over_planned": peak.step / planned}


def timed_step(
    context: Context, step: Run, operations: int, tokens: int, others: Mapping[str, Run] | None = None
) -> dict[str, Any]:
    """A step of so many tokens in turn with a product of matrices, and with other forms of it.

    Args:
        operations: that the step cannot do without.
        others: by name; their seconds are under "others".
    """
    settings = context.settings
    # timed beside the step, since its rate changes with clock and load
    product = Product(context.device, settings.dtype, settings.matmul_size)
    runs: dict[str, Run] = {"step": step, "product": product, **(others or {})}
    medians = interleaved_medians(runs, context.clock, settings.rounds_s, _LEAST_ROUNDS)
    seconds, rate = medians.pop("step"), product.operations / medians.pop("product")
    return {
        "seconds": seconds,
        "us_per_token": 1e6 * seconds / tokens,
        "tokens_per_s": tokens / seconds,
        "tflops": operations / seconds / 1e12,
        "matmul_tflops": rate / 1e12,
        "share_of_floor": operations / seconds / rate,
        "others": medians,
    }


def markdown(found: Mapping[str, Any]) -> list[str]:
    """One line a row of the measurement."""
    head = ["model", "recomputed", "tokens", "tokens/s", "us/token", "share of FLOP floor"]
    head += ["peak of the step", "planned", "measured / planned", "reserved / planned"]
    rows = []
    for row in found["rows"]:
        name = f"{row['shape']}, {weights_name(row['weights'], found['dtype'])}"
        line = [name, row["checkpointing"], f"{row['tokens']}"]
        if row.get("out_of_memory"):
            line += ["out of memory", NONE, NONE, NONE, size(row["planned_step_bytes"]), NONE, NONE]
        else:
            line += [plain(row["tokens_per_s"]), plain(row["us_per_token"]), percent(row["share_of_floor"])]
            line += [size(row["step_bytes"]), size(row["planned_step_bytes"]), times(row["step_over_planned"])]
            line += [times(row.get("reserved_over_planned"))]
        rows.append(line)
    lengths = found["lengths"]
    return [
        "The frozen model alone: forward and backward to its inputs, random weights, packed sequences of "
        f"{lengths['mean']:.0f} tokens on average (the longest {lengths['longest']}). The last layer gives what is "
        "read out: the last position of every sequence.",
        "The FLOP floor is the time that the linear layers (forward and gradient of the inputs) and attention take at "
        "the rate of products measured in turn with the step. The peak is what the step adds to the weights.",
        "",
        *table(head, rows),
    ]
