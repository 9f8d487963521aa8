"""The optimizer: groups, moments in 8 bits, what they weigh, and refusals by name."""

import importlib.util

import pytest
import torch
from torch import nn

from laser_fast.config import OptimizerConfig
from laser_fast.planning.plan import optimizer_bytes_per_parameter
from laser_fast.training.optimizer import build_optimizer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install laser-fast[4bit])"
)
EIGHT_BIT = OptimizerConfig(eight_bit=True, learning_rate=1e-2)


def modules() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(128, 128)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return nn.Sequential(linear, nn.LayerNorm(128))


def moved(
    config: OptimizerConfig, steps: int = 20, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """How far each parameter gets under the same noisy gradients."""
    trained, generator = modules().to(device), torch.Generator().manual_seed(1)
    start = [parameter.detach().clone() for parameter in trained.parameters()]
    optimizer = build_optimizer(trained, config)
    for _ in range(steps):
        for parameter, origin in zip(trained.parameters(), start, strict=True):
            parameter.grad = origin + torch.randn(origin.shape, generator=generator).to(device)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() - origin for p, origin in zip(trained.parameters(), start, strict=True)], optimizer


def state_bytes(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    """Of the moments and their scales; the table of codes is shared by all parameters."""
    moments = {name: value for name, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
    return sum(value.nbytes for name, value in moments.items() if value.dim() and not name.startswith("qmap"))


def test_only_matrices_of_linear_maps_decay() -> None:
    trained = modules()
    trained[1].weight.requires_grad_(False)  # type: ignore[index]
    groups = build_optimizer(trained, OptimizerConfig(weight_decay=0.5)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(128, 128)], [(128,), (128,)]]


@needs_bitsandbytes
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_eight_bits_go_where_thirty_two_go(device: str) -> None:
    exact, _ = moved(OptimizerConfig(learning_rate=1e-2), device=device)
    packed, optimizer = moved(EIGHT_BIT, device=device)
    groups = optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    large = float((packed[0] - exact[0]).norm() / exact[0].norm())
    assert 1e-6 < large < 0.05  # 1.4 % was measured after 20 steps: moments really are in 8 bits, and good enough
    for ours, theirs in zip(packed[1:], exact[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # small tensors stay in 32 bits


@needs_bitsandbytes
@pytest.mark.parametrize("config", [OptimizerConfig(), EIGHT_BIT], ids=["32 bit", "8 bit"])
def test_the_bytes_of_the_plan_are_those_of_the_state(config: OptimizerConfig) -> None:
    _, optimizer = moved(config, steps=1)
    weight = optimizer.param_groups[0]["params"][0]
    assert state_bytes(optimizer, weight) == optimizer_bytes_per_parameter(config) * weight.numel()


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'eight_bit needs bitsandbytes, got none; pip install "laser-fast\[4bit\]"'):
        build_optimizer(modules(), EIGHT_BIT)


@needs_bitsandbytes
def test_a_device_without_a_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def step(self: object) -> None:
        raise NotImplementedError("no kernel for CPU")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", step)
    with pytest.raises(RuntimeError, match="must run on the device of the parameters, got 'cpu', .* set it to false"):
        build_optimizer(modules(), EIGHT_BIT)
