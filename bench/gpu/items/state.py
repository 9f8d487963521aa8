"""Item 1: what is installed, in which form the libraries offer what is used of them, and whether it works at all."""

import inspect
import math
from functools import partial
from typing import Any

from gpu.work import Found, Work

_LENGTHS_Q, _LENGTHS_K = [50, 1, 0, 130], [82, 33, 0, 162]  # a prefix of 32 in front of every sequence with text
_HEADS, _HEADS_K, _SIZE = 32, 8, 128
_SCHEMAS = ("_flash_attention_forward", "_flash_attention_backward")
_SIGNATURE = "transformers AttentionInterface"
_PROBES = {"grouped queries behind a prefix, forward": 0, "grouped queries behind a prefix, gradients": 1}


def names(rehearse: bool) -> list[str]:
    """The doctor, the probes, then signatures."""
    return ["laser-fast doctor", *_PROBES, *_SCHEMAS, _SIGNATURE]


def run(work: Work) -> None:
    """Look, then try grouped queries against float64."""
    work.measure("laser-fast doctor", _doctor, attention="none")
    device = "cpu" if work.rehearse else "cuda"
    for name, index in _PROBES.items():
        work.measure(name, partial(_grouped_queries, device, index), attention="named")
    for name in _SCHEMAS:
        work.measure(name, partial(_schema, name), attention="none")
    work.measure(_SIGNATURE, _signature, attention="none")


def _doctor() -> Found:
    from laser_fast.doctor import diagnose

    components = diagnose()
    off = [f"{part.name}: {part.reason}" for part in components if not part.on]
    said = {part.name: f"{'on' if part.on else 'off'} {part.version} {part.reason}".strip() for part in components}
    failure = next((part.reason for part in components if part.required and not part.on), None)
    return Found(len(off), "components off", failure=failure, more={"components": said})


def _signature() -> Found:
    import transformers

    interface = getattr(transformers, "AttentionInterface", None)
    if interface is None:
        return Found(None, "", failure="transformers has no AttentionInterface")
    return Found(None, "", backend=str(inspect.signature(interface)))


def _schema(name: str) -> Found:
    import torch

    operation = getattr(torch.ops.aten, name)
    schemas = [str(getattr(operation, overload)._schema) for overload in operation.overloads()]
    return Found(None, "", backend="; ".join(schemas))


def _grouped_queries(device: str, index: int) -> Found:
    """Worst relative error of the result or of a gradient, in bfloat16 against float64 on the CPU."""
    import torch

    from laser_fast.lm.attention.packed_attention import varlen_attention
    from laser_fast.ops import cu_seqlens_from_lengths

    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(_LENGTHS_Q), _HEADS), (sum(_LENGTHS_K), _HEADS_K), (sum(_LENGTHS_K), _HEADS_K)]
    exact_inputs = [torch.randn(*shape, _SIZE, generator=generator).bfloat16().double() for shape in shapes]
    bounds = [cu_seqlens_from_lengths(torch.tensor(lengths)) for lengths in (_LENGTHS_Q, _LENGTHS_K)]
    probe = torch.randn(*shapes[0], _SIZE, generator=generator).bfloat16().double()

    def computed(where: str, dtype: torch.dtype) -> list[Any]:
        inputs = [tensor.to(where, dtype).requires_grad_() for tensor in exact_inputs]
        output = varlen_attention(*inputs, *(bound.to(where) for bound in bounds), causal=True)
        return [output, *torch.autograd.grad((output * probe.to(where, dtype)).sum(), inputs)]

    exact = [tensor.detach() for tensor in computed("cpu", torch.float64)]
    found = [tensor.detach().double().cpu() for tensor in computed(device, torch.bfloat16)]
    pairs = list(zip(found, exact, strict=True))
    pairs = pairs[1:] if index else pairs[:1]
    errors = [float((one - other).norm() / other.norm()) for one, other in pairs]
    worst, allowed = max(errors), 4 * torch.finfo(torch.bfloat16).eps
    failure = None if worst < allowed and math.isfinite(worst) else f"off by {worst:.2g}, allowed are {allowed:.2g}"
    return Found(worst, "relative error", failure=failure)
