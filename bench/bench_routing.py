"""Routing: `route_experts` against the Laser authors' form and against packed plain PyTorch, eager and compiled."""

from collections.abc import Callable

import pytest
import torch
from baselines.routing_loop import routing_loop
from baselines.routing_packed import mean_index_add, mean_segment_reduce, routing_rounds, routing_topk
from forms import PASSES, CompareForms, CompileForms, Form, relative_error
from torch import Tensor
from workloads import ROUTING, Case, Workload, random_draw

from laser_fast.ops import cu_seqlens_from_lengths, route_experts


def routing_bytes(shape: Workload, name: str) -> int:
    """States read in each pass, their gradient written in backward; E float32 probabilities an item kept between."""
    states = shape.users * shape.items * shape.width * shape.dtype.itemsize
    probabilities = shape.users * shape.items * shape.experts * 4
    passes = {"forward": states + probabilities, "backward": 2 * states + probabilities}
    return passes.get(name, sum(passes.values()))


def routing_forms(shape: Workload) -> tuple[Form, dict[str, Form], dict[str, Form]]:
    """The candidate, the forms timed as they are, and the forms worth compiling."""
    draw = random_draw(shape)
    states = draw(shape.users * shape.items, shape.width).to(shape.dtype)
    weight = draw(shape.experts, shape.width) / shape.width**0.5
    inputs = [tensor.requires_grad_() for tensor in (states, weight, torch.zeros_like(weight[:, 0]))]
    cu_seqlens = cu_seqlens_from_lengths(torch.full((shape.users,), shape.items)).to(shape.device)
    mask = torch.ones(shape.users, shape.items, dtype=torch.long, device=shape.device)
    padded = [states.detach().view(*mask.shape, -1).requires_grad_(), *inputs[1:]]

    def candidate(*given: Tensor) -> tuple[Tensor, ...]:
        routing = route_experts(*given, cu_seqlens, shape.top_k)
        return routing.weight, routing.pooled, routing.balance_loss, routing.expert

    def loop(*given: Tensor) -> tuple[Tensor, ...]:
        return routing_loop(*given, mask, shape.top_k)

    def loop_of_packed(states: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return loop(states.view(*mask.shape, -1), *rest)

    def topk_one_hot(*given: Tensor) -> tuple[Tensor, ...]:
        return routing_topk(*given, cu_seqlens, shape.top_k)

    def rounds(mean: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *given: routing_rounds(*given, cu_seqlens, shape.top_k, mean)

    loop_form = Form(loop, padded, captured=False, comparable=loop_of_packed)
    others = {"loop": loop_form, "topk_one_hot": Form(topk_one_hot, inputs)}
    strongest = {
        "index_add": Form(rounds(mean_index_add), inputs),
        "segment_reduce": Form(rounds(mean_segment_reduce), inputs),
    }
    return Form(candidate, inputs), others, strongest


def assert_choices(candidate: Form, forms: dict[str, Form]) -> None:
    """Every form chooses as well, by the scores of the chosen experts: two alike within rounding may change places."""
    _, pooled, _, chosen = candidate.function(*candidate.inputs)
    expected = pooled.gather(1, chosen.long())
    for name, form in forms.items():
        expert = (form.comparable or form.function)(*candidate.inputs)[3]
        assert relative_error(pooled.gather(1, expert.long()), expected) < 1e-5, f"{name} chooses others"


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", ROUTING, ids=str, indirect=True)
def test_route_experts(case: Case, name: str, compiled: CompileForms, compare_forms: CompareForms) -> None:
    candidate, others, strongest = routing_forms(case.workload)
    baselines = others | compiled(strongest)
    assert_choices(candidate, baselines)
    compare_forms(case, name, candidate, baselines, moved_bytes=routing_bytes(case.workload, name))
