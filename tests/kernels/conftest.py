"""What the tests of the kernels share: where they run, batches to route, and memory with guards around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_GUARD = 256  # elements on either side, so that what lies between stays aligned for 16-byte stores
_SENTINEL = 12345  # rounded to the dtype alike when it is written and when it is looked for


class RoutingInputs(NamedTuple):
    """Arguments of `route_forward` before the weighting."""

    states: Tensor
    router: Tensor
    bias: Tensor
    cu_seqlens: Tensor
    top_k: int

    def double(self) -> RoutingInputs:
        return self._replace(states=self.states.double(), router=self.router.double(), bias=self.bias.double())


class GuardedMemory(TorchFunctionMode):
    """Every tensor made by `new_empty` or `empty_like` becomes a slice of a larger one that is full of a sentinel."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # the interpreter makes tensors too, and names their device
        if func not in (Tensor.new_empty, torch.empty_like) or "device" in (kwargs or {}):
            return made
        buffer = torch.full((made.numel() + 2 * _GUARD,), _SENTINEL, dtype=made.dtype, device=made.device)
        self.buffers.append(buffer)
        return buffer[_GUARD : _GUARD + made.numel()].view(made.shape)

    def assert_untouched(self) -> None:
        """Check the guards; call it outside of the mode."""
        assert self.buffers
        for buffer in self.buffers:
            guards = torch.cat([buffer[:_GUARD], buffer[-_GUARD:]])
            assert torch.equal(guards, torch.full_like(guards, _SENTINEL)), tuple(buffer.shape)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the first GPU, or the CPU in Triton's interpreter."""
    from triton import knobs

    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if not knobs.runtime.interpret:
        pytest.skip("kernels are compiled here (there are GPU device files), and torch sees no CUDA device")
    return torch.device("cpu")


@pytest.fixture
def interpreter(device: torch.device) -> Any:
    """The module of Triton's interpreter, for tests that look at single loads and stores."""
    if device.type != "cpu":
        pytest.skip("looks into Triton's interpreter, and here the kernels are compiled for the GPU")
    from triton.runtime import interpreter

    return interpreter


@pytest.fixture
def guarded_memory() -> type[GuardedMemory]:
    return GuardedMemory


@pytest.fixture
def routing_inputs(device: torch.device) -> Callable[..., RoutingInputs]:
    """`make(lengths, width, num_experts, top_k, dtype)`: states of that dtype, a float32 router of realistic scale."""

    def make(
        lengths: tuple[int, ...], width: int, num_experts: int, top_k: int, dtype: torch.dtype = torch.float32
    ) -> RoutingInputs:
        generator = torch.Generator().manual_seed(17)
        states = torch.randn(sum(lengths), width, generator=generator)
        router = torch.randn(num_experts, width, generator=generator) / width**0.5  # logits of size 1
        bias = torch.randn(num_experts, generator=generator)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        tensors = states.to(dtype), router, bias, cu_seqlens
        return RoutingInputs(*[tensor.to(device) for tensor in tensors], top_k)

    return make
