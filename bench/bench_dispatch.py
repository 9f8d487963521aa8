"""Dispatch and combine against the Laser authors' form and against indexing and products, eager and compiled."""

from collections.abc import Callable

import pytest
import torch
from baselines.dispatch_loop import combine_loop, dispatch_loop
from baselines.dispatch_packed import (
    combine_einsum,
    combine_sum,
    dispatch_index_select,
    dispatch_indexing,
    dispatch_one_hot,
)
from forms import PASSES, CompareForms, CompileForms, Form
from torch import Tensor, nn
from workloads import DISPATCH, Case, Draw, Workload, random_draw

from laser_fast.ops import combine_queries, dispatch_queries

_SAFE_SPEEDUP = 5  # of a dispatch over the loop, forward, with the demo's query tokens; 15 to 25 were measured


def dispatch_bytes(shape: Workload, name: str) -> int:
    """Forward reads E slabs and writes B k of them; backward the other way round."""
    slab = shape.queries * shape.width * shape.dtype.itemsize
    return slab * (shape.users * shape.top_k + shape.experts) * (2 if name == "forward+backward" else 1)


def combine_bytes(shape: Workload, name: str) -> int:
    """Forward reads k slabs a user and writes one; backward reads these k + 1 and writes k."""
    slab = shape.queries * shape.width * shape.dtype.itemsize
    forward, backward = shape.users * (shape.top_k + 1), shape.users * (2 * shape.top_k + 1)
    return slab * {"forward": forward, "backward": backward}.get(name, forward + backward)


def random_choice(shape: Workload, draw: Draw) -> Tensor:
    """int32 [B, k], distinct for a user."""
    return draw(shape.users, shape.experts).argsort(dim=1)[:, : shape.top_k].int()


def loop_table(queries: Tensor) -> nn.ParameterList:
    """[E, Q, D] as the authors keep it: E parameters [1, Q, D]."""
    return nn.ParameterList([nn.Parameter(slab.detach().clone()) for slab in queries.split(1)])


def dispatch_forms(shape: Workload) -> tuple[Form, dict[str, Form], dict[str, Form]]:
    """The candidate, the forms timed as they are, and the forms worth compiling."""
    draw = random_draw(shape)
    inputs = [draw(shape.experts, shape.queries, shape.width).to(shape.dtype).requires_grad_()]
    expert = random_choice(shape, draw)
    table, long_expert = loop_table(inputs[0]), expert.long()

    def loop_of_tensor(queries: Tensor) -> Tensor:
        return torch.stack(dispatch_loop(queries.split(1), long_expert), dim=1).flatten(0, 1)

    def of(function: Callable[[Tensor, Tensor], Tensor]) -> Form:
        return Form(lambda given: function(given, expert), inputs)

    loop = Form(lambda *_: dispatch_loop(table, long_expert), list(table), captured=False, comparable=loop_of_tensor)
    strongest = {"indexing": of(dispatch_indexing), "one_hot": of(dispatch_one_hot)}
    return of(dispatch_queries), {"loop": loop, "index_select": of(dispatch_index_select)}, strongest


def combine_forms(shape: Workload) -> tuple[Form, dict[str, Form], dict[str, Form]]:
    """The candidate, the forms timed as they are, and the forms worth compiling."""
    draw = random_draw(shape)
    outputs = draw(shape.users * shape.top_k, shape.queries, shape.width).to(shape.dtype)
    weight = draw(shape.users, shape.top_k).softmax(dim=1)
    inputs = [outputs.requires_grad_(), weight.requires_grad_()]
    by_user = outputs.detach().view(shape.users, shape.top_k, shape.queries, shape.width)
    groups = [group.contiguous().requires_grad_() for group in by_user.unbind(1)]

    def loop(*given: Tensor) -> Tensor:
        return combine_loop(given[:-1], given[-1])

    def loop_of_packed(outputs: Tensor, weight: Tensor) -> Tensor:
        return combine_loop(outputs.view(by_user.shape).unbind(1), weight)

    # this loop is over the k choices and reads nothing back, so a graph can hold it
    others = {"loop": Form(loop, [*groups, weight], comparable=loop_of_packed)}
    strongest = {"einsum": Form(combine_einsum, inputs), "sum": Form(combine_sum, inputs)}
    return Form(combine_queries, inputs), others, strongest


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", DISPATCH, ids=str, indirect=True)
def test_dispatch_queries(case: Case, name: str, compiled: CompileForms, compare_forms: CompareForms) -> None:
    candidate, others, strongest = dispatch_forms(case.workload)
    moved = dispatch_bytes(case.workload, name)
    speedups = compare_forms(case, name, candidate, others | compiled(strongest), moved_bytes=moved)
    if (case.name, name) == ("cpu-demo", "forward"):
        assert speedups["loop"] > _SAFE_SPEEDUP


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", DISPATCH, ids=str, indirect=True)
def test_combine_queries(case: Case, name: str, compiled: CompileForms, compare_forms: CompareForms) -> None:
    candidate, others, strongest = combine_forms(case.workload)
    moved = combine_bytes(case.workload, name)
    compare_forms(case, name, candidate, others | compiled(strongest), moved_bytes=moved)
