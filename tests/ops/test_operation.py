"""An operation called past the dispatcher: when it is, when it must not be, and that both ways do the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from laser_fast.ops import combine_queries, dispatch, dispatch_queries, route_experts, routing
from laser_fast.ops.operation import Operation, operation

OPERATIONS = [
    value for module in (routing, dispatch) for value in vars(module).values() if isinstance(value, Operation)
]


@operation("laser_fast_test::scale")
def scale(values: Tensor, factor: float) -> Tensor:
    return torch.from_numpy(values.detach().numpy() * factor)  # reads memory, as kernels do


@operation("laser_fast_test::scale_backward")
def scale_backward(grad: Tensor, factor: float) -> Tensor:
    return torch.from_numpy(grad.detach().numpy() * factor)


for one in (scale, scale_backward):
    one.register_fake(lambda values, factor: torch.empty_like(values))
scale.register_autograd(
    lambda ctx, grad: (scale_backward(grad, ctx.factor), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
)


class Calls:
    """What ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dispatched: list[str] = []
        for one in (scale, scale_backward, *OPERATIONS):
            self._watch(one, monkeypatch)

    def _watch(self, one: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
        name, registered = one.body.__name__, one.registered

        def counted(*arguments: object) -> object:
            self.dispatched.append(name)
            return registered(*arguments)

        monkeypatch.setattr(one, "registered", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    return Calls(monkeypatch)


def test_eager_code_never_enters_the_custom_ops(calls: Calls) -> None:
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (5, 4), (5,), (5, 2, 3))]
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)

    def combined() -> Tensor:
        routed = route_experts(*leaves[:3], cu_seqlens, 2)
        return combine_queries(dispatch_queries(leaves[3], routed.expert), routed.weight)

    combined().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    with torch.no_grad():
        assert not combined().requires_grad
    with torch.inference_mode():
        combined()
    assert len(OPERATIONS) == 6 and calls.dispatched == []


def test_both_ways_give_the_same(calls: Calls) -> None:
    values = torch.randn(5, requires_grad=True)
    directly, registered = scale(values, 3.0), scale.registered(values, 3.0)
    assert torch.equal(directly, registered) and torch.equal(directly, values * 3)
    for result in (directly, registered):
        assert torch.equal(torch.autograd.grad(result.sum(), values)[0], torch.full((5,), 3.0))


@pytest.mark.parametrize("way", ["directly", "registered"])
def test_a_gradient_cannot_be_differentiated_again(way: str) -> None:
    values = torch.randn(5, requires_grad=True)
    result = (scale if way == "directly" else scale.registered)(values, 3.0)
    (grad,) = torch.autograd.grad(result.square().sum(), values, create_graph=True)
    # together with a term that can be: the missing one must not be taken for zero
    with pytest.raises(RuntimeError, match="scale_backward.* no autograd formula was registered"):
        torch.autograd.grad(grad.sum() + values.square().sum(), values)


def test_a_parameter_is_plain_memory(calls: Calls) -> None:
    parameter = nn.Parameter(torch.ones(2))
    scale(parameter, 2.0).sum().backward()
    assert parameter.grad is not None and parameter.grad.tolist() == [2.0, 2.0] and calls.dispatched == []


class Plain(TorchDispatchMode):
    """Lets everything through."""

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        return func(*args, **(kwargs or {}))  # type: ignore[operator, misc]


class Subclass(Tensor):
    """Could be anything."""


def test_the_dispatcher_sees_what_is_not_plain_memory(calls: Calls) -> None:
    values = torch.ones(2, requires_grad=True)
    with Plain():
        scale(values, 2.0).sum().backward()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = scale(mode.from_tensor(values.detach()), 2.0)
    scale(fake, 2.0)  # out of the mode
    scale(torch.ones(2).as_subclass(Subclass), 2.0)
    assert scale(torch.ones(2, device="meta"), 2.0).is_meta
    assert calls.dispatched == ["scale", "scale_backward", "scale", "scale", "scale", "scale"]


def test_vmap_and_batched_gradients_go_through_the_dispatcher(calls: Calls) -> None:
    rows = torch.randn(3, 5)
    assert torch.equal(torch.vmap(lambda row: scale(row, 2.0))(rows), 2 * rows)
    values = torch.randn(5, requires_grad=True)
    (grads,) = torch.autograd.grad(scale(values, 2.0), values, rows, is_grads_batched=True)
    assert torch.equal(grads, 2 * rows) and calls.dispatched == ["scale", "scale_backward"]


def test_a_forward_mode_derivative_is_refused_not_dropped() -> None:
    values, tangent = torch.randn(5), torch.ones(5)
    expected = "scale: tensors must have no forward-mode tangent, got one; use backward"
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=expected):
            scale(forward_ad.make_dual(values, tangent), 2.0)
        assert torch.equal(scale(values, 2.0), 2 * values)
    with pytest.raises(NotImplementedError, match=expected):
        torch.func.jvp(lambda given: scale(given, 2.0), (values,), (tangent,))


def test_compiled_code_holds_the_custom_op() -> None:
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda values: scale(values, 2.0) + 1, fullgraph=True, backend=backend)
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
    assert any("laser_fast_test.scale" in name for name in found)
