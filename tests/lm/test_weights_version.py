"""The version of weights: another after every write, and only then."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd.graph import increment_version

from laser_fast.lm.weights_version import WeightsVersion


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1)))


class WritesThroughData(torch.optim.Optimizer):
    """As optimizers of other libraries do it."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "loop": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, fused=True),
    "data": lambda parameters: WritesThroughData(parameters, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_of_every_optimizer_counts(name: str) -> None:
    model = module()
    weights, others = WeightsVersion(model), WeightsVersion(module())
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    seen, apart = [weights.now()], others.now()
    for _ in range(3):
        model(torch.ones(4, 2)).square().sum().backward()
        assert weights.now() == seen[-1]
        optimizer.step()
        seen.append(weights.now())
    assert len(set(seen)) == 4 and others.now() == apart


def test_writes_and_exchanges_count() -> None:
    model = module()
    weights = WeightsVersion(model)
    first, second = model[0], model[1]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Sequential)

    def in_place() -> None:
        with torch.no_grad():
            first.weight.mul_(2.0)

    def parametrized() -> None:
        torch.nn.utils.parametrizations.weight_norm(second[0])

    def parametrized_weight() -> None:
        with torch.no_grad():
            second[0].parametrizations.weight.original1.mul_(2.0)

    def through_data() -> None:
        first.weight.data.mul_(2.0)
        increment_version(first.weight)  # what the docstring asks for

    changes: dict[str, Callable[[], object]] = {
        "in place": in_place,
        "loaded": lambda: model.load_state_dict(module().state_dict()),
        "assigned": lambda: model.load_state_dict(module().state_dict(), assign=True),
        "other data": lambda: setattr(first.weight, "data", torch.zeros(3, 2)),
        "parameter": lambda: setattr(first, "bias", nn.Parameter(torch.zeros(3))),
        "module": lambda: second.__setitem__(0, nn.Linear(3, 1)),
        "parametrized": parametrized,
        "parametrized weight": parametrized_weight,
        "dtype": lambda: model.to(torch.float64),
        "through data": through_data,
    }
    for name, change in changes.items():
        before = weights.now()
        model(torch.ones(1, 2, dtype=first.weight.dtype))
        model.train(not model.training)
        assert weights.now() == before, name
        change()
        assert weights.now() != before, name


def test_memory_that_comes_back_is_no_disguise() -> None:
    model = module()
    weights, before = WeightsVersion(model), []
    for _ in range(4):
        before.append(weights.now())
        for _ in range(2):  # the second finds the memory that the first gave up, in the same tensor
            for parameter in model.parameters():
                parameter.data = parameter.data - 0.1
    assert len({*before, weights.now()}) == 5


def test_a_module_in_one_that_had_none_counts() -> None:
    model = module()
    weights = WeightsVersion(model)
    before = weights.now()
    model[0].added = nn.Linear(2, 3)
    added = weights.now()
    with torch.no_grad():
        model[0].added.weight.mul_(2.0)
    assert len({before, added, weights.now()}) == 3


def test_a_move_is_adopted() -> None:
    model = module()
    weights = WeightsVersion(model)
    before = weights.now()
    model.to(torch.float64)
    weights.adopt()
    assert weights.now() == before


def test_buffers_count_where_asked_for() -> None:
    model = nn.BatchNorm1d(2)
    without, with_buffers = WeightsVersion(model), WeightsVersion(model, buffers=True)
    before = without.now(), with_buffers.now()
    model(torch.randn(4, 2))
    assert without.now() == before[0] and with_buffers.now() != before[1]


def test_a_copy_counts_for_itself() -> None:
    model = module()
    pair = model, WeightsVersion(model)
    before = pair[1].now()
    copied, version = copy.deepcopy(pair)
    version.adopt()
    with torch.no_grad():
        copied[0].weight.mul_(2.0)
    assert version.now() != before and pair[1].now() == before


def test_weights_of_inference_mode_are_no_error() -> None:
    with torch.inference_mode():
        model = module()
    weights = WeightsVersion(model)
    before = weights.now()
    model[0].weight.data = torch.zeros(3, 2)
    assert weights.now() != before
