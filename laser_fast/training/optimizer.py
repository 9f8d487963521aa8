"""AdamW with moments in 32 or 8 bits, and the schedule of the learning rate."""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from laser_fast.config import OptimizerConfig
from laser_fast.runs.resume import State

_SMALLEST_PACKED = 4096  # values of a parameter below which its moments stay in 32 bits (bitsandbytes' default)


def build_optimizer(modules: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over what requires a gradient; only the matrices of linear maps decay.

    With `eight_bit`, moments have 8 bits and one scale for 256 values (Dettmers et al. 2022, arXiv:2110.02861);
    parameters of fewer than 4096 values keep theirs in 32 bits.
    """
    decayed = {id(module.weight) for module in modules.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    if not config.eight_bit:
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeError(
            'build_optimizer: optimizer.eight_bit needs bitsandbytes, got none; pip install "laser-fast[4bit]"'
        )
    from bitsandbytes.optim import AdamW8bit

    for device in {parameter.device for parameter in trained}:
        if device.type != "cuda":
            _check_device(AdamW8bit, device)
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=config.learning_rate, min_8bit_size=_SMALLEST_PACKED)
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """Moments and learning rates."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else plain)[f"{index}.{key}"] = value
    return State(tensors, {"optimizer": plain, "learning_rates": [group["lr"] for group in optimizer.param_groups]})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Go on from what `optimizer_state` gave."""
    entries: dict[int, dict[str, Any]] = {}
    for name, value in {**state.tensors, **state.values["optimizer"]}.items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    for group, learning_rate in zip(groups, state.values["learning_rates"], strict=True):
        group["lr"] = learning_rate
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def warmup_cosine(num_steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear up to 1, then a cosine down to 0.

    Unlike transformers' schedule of this shape, its first step has a rate above 0.
    """
    warmup = max(1, round(num_steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup))))

    return factor


def _check_device(optimizer: Any, device: torch.device) -> None:
    """Take a step on zeros: versions of bitsandbytes have kernels for different devices."""
    probe = nn.Parameter(torch.zeros(_SMALLEST_PACKED, device=device))
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer([probe], lr=0.0, min_8bit_size=_SMALLEST_PACKED).step()
    except (AssertionError, RuntimeError) as error:  # an op without a kernel, a torch without CUDA
        raise RuntimeError(
            f"build_optimizer: optimizer.eight_bit must run on the device of the parameters, got {device.type!r}, "
            "which this version of bitsandbytes has no 8-bit Adam for; set it to false"
        ) from error
