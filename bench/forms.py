"""Forms of one operation: what is run in a pass, and that all of them compute the same before anything is timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timing import Run
from torch import Tensor

PASSES = ("forward", "backward", "forward+backward")

_WORST_STATES = 0.2  # in bfloat16, of 32 random layers: right ones differ by 0.05, wrong ones by about 1
Function = Callable[..., Any]  # of tensors, to a tensor or a tuple of them


@dataclass(frozen=True)
class Form:
    """One way to compute an operation.

    Attributes:
        function: of `inputs`, to a tensor or several; those that need a gradient are differentiated.
        inputs: leaves, each differentiated.
        captured: whether a CUDA graph can hold it; not where something is read back to the host.
        comparable: the same on the inputs of the candidate and in its layout, where the form has others.
    """

    function: Function
    inputs: Sequence[Tensor]
    captured: bool = True
    comparable: Function | None = None


CompileForms = Callable[[dict[str, Form]], dict[str, Form]]  # the fixture `compiled`
Compare = Callable[..., dict[str, float]]  # the fixtures `compare` and `compare_steps`: speed-ups by baseline
CompareForms = Compare  # the fixture `compare_forms`


def skip_unless_on(wanted: str, device: torch.device) -> None:
    """Skip a benchmark whose workload is for the other kind of device."""
    if wanted != device.type:
        import pytest  # a report needs forms, and no pytest

        pytest.skip("needs a CUDA device, and torch sees none" if wanted == "cuda" else "a workload for the CPU")


def _differentiable(outputs: Any) -> list[Tensor]:
    return [output for output in ([outputs] if isinstance(outputs, Tensor) else outputs) if output.requires_grad]


def _random_like(outputs: Sequence[Tensor]) -> list[Tensor]:
    # not ones: they hide errors that cancel, and a sum of many in bfloat16 stands still
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    draw = {"generator": generator, "device": outputs[0].device}
    return [torch.randn(output.shape, **draw).to(output.dtype) for output in outputs]


def fresh_leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers as leaves of their own: autograd remembers the stream on which a leaf was first used."""
    return [tensor.detach().requires_grad_() for tensor in inputs]


def one_pass(name: str, function: Function, inputs: Sequence[Tensor]) -> Run:
    """The forward pass of `function`, its backward pass alone, or both, for inputs that require gradients."""
    if name == "forward":
        return lambda: function(*inputs)
    outputs = _differentiable(function(*inputs))
    grads = _random_like(outputs)
    if name == "backward":
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
    return lambda: torch.autograd.grad(_differentiable(function(*inputs)), inputs, grads)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Of the worst row (last dimension)."""
    actual, exact = torch.atleast_1d(actual.double()), torch.atleast_1d(exact.double())
    scale = exact.norm(dim=-1).clamp_min(1e-30)
    return ((actual - exact).norm(dim=-1) / scale).max().item()


def _evaluate(function: Function, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    outputs = _differentiable(function(*inputs))
    return outputs, list(torch.autograd.grad(outputs, inputs, _random_like(outputs)))


def assert_agreement(candidate: Form, forms: Mapping[str, Form]) -> None:
    """Every form has the candidate's results, row by row, and its gradients, as a whole.

    A row of a gradient may differ where two experts score alike within rounding and forms choose different ones.
    """
    outputs, grads = _evaluate(candidate.function, candidate.inputs)
    # in bfloat16 some forms round after every addition; a wrong formula is further off
    exact = all(tensor.dtype == torch.float32 for tensor in (*outputs, *candidate.inputs))
    tolerance = 1e-4 if exact else 5e-2
    for name, form in forms.items():
        others, other_grads = _evaluate(form.comparable or form.function, candidate.inputs)
        for index, (actual, expected) in enumerate(zip(others, outputs, strict=True)):
            error = relative_error(actual, expected)
            assert error < tolerance, f"{name}: result {index} is off by {error:.1e} in one row"
        for index, (actual, expected) in enumerate(zip(other_grads, grads, strict=True)):
            error = relative_error(actual.flatten(), expected.flatten())
            assert error < tolerance, f"{name}: gradient {index} is off by {error:.1e}"


def assert_same_states(actual: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """States of a model that computes in `dtype`: element by element, or all together in bfloat16, where layers add up
    roundings."""
    if dtype != torch.bfloat16:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        return
    error = relative_error(actual.flatten(), expected.flatten())
    assert error < _WORST_STATES, f"states are off by {error:.1e}"


def compile_forms(forms: Mapping[str, Form], backend: str = "inductor") -> dict[str, Form]:
    """`torch.compile` of every form, for the shapes of its inputs, under its name with `compiled_` before it."""
    torch.compiler.reset()  # every benchmark compiles functions of its own, and their number is limited
    torch._functorch.config.donated_buffer = False  # a backward pass alone runs more than once
    return {
        f"compiled_{name}": Form(
            torch.compile(form.function, fullgraph=True, dynamic=False, backend=backend), form.inputs
        )
        for name, form in forms.items()
    }
